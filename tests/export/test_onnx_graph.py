"""The exported ONNX graph: its contract, its metadata, and parity in every precision."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from export.formats import TOLERANCES
from export.parity import check_parity
from tests.support.commands import ROOT
from tests.support.networks import POINTWISE, SIZES, build_engine, network, spec_of


def test_the_graph_keeps_the_contract(exported: Path) -> None:
    graph = onnx.load(exported / "fold_0" / "model.onnx").graph
    shapes = {
        value.name: (
            value.type.tensor_type.elem_type,
            [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim],
        )
        for value in (*graph.input, *graph.output)
    }
    batch = shapes["images"][1][0]
    assert isinstance(batch, str), "the batch is dynamic"
    assert shapes["images"] == (onnx.TensorProto.UINT8, [batch, 32, 32, 3])
    assert shapes["features"] == (onnx.TensorProto.FLOAT, [batch, 64])
    assert shapes["logits"] == (onnx.TensorProto.FLOAT, [batch, 1])
    readers = {node.op_type for node in graph.node if "images" in node.input}
    assert readers <= {"Cast", "Shape"}, "TensorRT refuses to transpose uint8"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_file_has_no_path_of_this_machine(precision: str, tmp_path: Path) -> None:
    model, _ = network("test_vit3")
    build_engine(model, spec_of("test_vit3", "onnx", precision), tmp_path)
    (path,) = tmp_path.glob("*.onnx")
    for place in (str(ROOT), "site-packages", str(Path.home())):
        assert place.encode() not in path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "fp16") for name in SIZES),
        ("test_vit3", "int8"),
        ("test_convnext", "int8"),
        (POINTWISE, "int8"),
    ],
)
def test_every_family_passes_the_parity_check(name: str, precision: str, tmp_path: Path) -> None:
    model, reference = network(name)
    spec = spec_of(name, "onnx", precision)
    engine = build_engine(model, spec, tmp_path)
    assert check_parity(reference, engine, TOLERANCES[precision], spec.batch_sizes)
    batch, single = engine.run(reference.images)[0], engine.run(reference.images[3:4])[0]
    np.testing.assert_array_equal(
        batch[3:4], single, "an image's features do not depend on its batch"
    )
    properties = {
        prop.key: prop.value for prop in onnx.load(next(tmp_path.glob("*.onnx"))).metadata_props
    }
    assert properties["name"] == name
    assert properties["precision"] == precision
    assert '"size":' in properties["preprocess"]
