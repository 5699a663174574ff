"""Networks cast to a low precision, and 1x1 convolutions as linear layers."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export.formats import TOLERANCES
from export.network import artifact_network
from export.onnx_graph import ATTENTION_OPSET, trace
from export.parity import ParityError, Reference, check_parity, run_model
from export.precision import cast_model, head_as_sum
from tests.support.networks import (
    POINTWISE,
    SIZES,
    build_engine,
    network,
    spec_of,
    with_all_outputs,
)


def test_wide_1x1_convolutions_are_quantized(tmp_path: Path) -> None:
    model, _ = network(POINTWISE)
    names = {name for name, _ in model.named_parameters()}
    build_engine(model, spec_of(POINTWISE, "onnx", "int8"), tmp_path)
    products = [node.op_type for node in onnx.load(next(tmp_path.glob("*.onnx"))).graph.node]
    assert products.count("MatMulInteger") >= 2
    assert "Conv" in products, "the narrow and the spatial ones stay"
    assert names == {name for name, _ in model.named_parameters()}, "the model itself is unchanged"


@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, ATTENTION_OPSET])
@pytest.mark.parametrize("name", ["test_vit3", "test_convnext3"])
def test_normalisation_and_softmax_stay_in_float32(name: str, opset: int) -> None:
    graph = onnx.shape_inference.infer_shapes(
        trace(artifact_network(network(name)[0], "fp16"), SIZES[name], opset)
    )
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.graph.value_info, *graph.graph.input)
    }
    kinds |= {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    seen: dict[str, set[int]] = {}
    for node in graph.graph.node:
        assert not [
            attribute for attribute in node.attribute if attribute.name == "softmax_precision"
        ]
        seen.setdefault(node.op_type, set()).update(
            kinds[name] for name in node.input if name in kinds
        )
    assert seen["LayerNormalization"] == {single}
    assert seen.get("Softmax", {single}) == {single}
    assert seen.get("ReduceL2", {single}) <= {
        single,
        onnx.TensorProto.INT64,
    }
    assert half in seen["MatMul"], "the work itself is in float16"


@pytest.mark.slow
def test_a_saturated_norm_fails_the_parity_check(tmp_path: Path) -> None:
    """Float32 layers cannot repair activations beyond float16's range."""
    model, _ = network("test_vit3")
    loud = cast_model(model, "fp32")
    loud.backbone.blocks[0].mlp.fc2.weight.data *= 1e6  # type: ignore[index, union-attr]
    images = np.random.default_rng(1).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    engine = build_engine(loud, spec_of("test_vit3", "onnx", "fp16"), tmp_path)
    with pytest.raises(ParityError, match=r"not finite|cosine"):
        check_parity(Reference(loud, images), engine, TOLERANCES["fp16"], (1, 8))


def test_the_head_as_a_sum_gives_the_logits_of_the_product() -> None:
    model, reference = network(POINTWISE)
    changed = head_as_sum(model)
    features, logits = run_model(changed, reference.images)
    np.testing.assert_array_equal(features, reference.outputs[0])
    np.testing.assert_allclose(logits, reference.outputs[1], atol=1e-5)
    assert type(model.head[-1]) is nn.Linear, "the model itself is unchanged"


def test_all_linear_heads_become_sums() -> None:
    model = with_all_outputs()
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    for found, wanted in zip(
        run_model(head_as_sum(model), images), run_model(model, images), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    for precision in ("fp16", "bf16"):
        cast = cast_model(model, precision)
        kinds = {weight.dtype for head in cast.linear_heads for weight in head.parameters()}
        assert kinds == {torch.float32}
        assert cast.backbone.conv_stem.weight.dtype != torch.float32
