"""Every format in every precision that this machine runs, from small networks of each family."""

import gc
import re
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from export.formats import FORMATS, TOLERANCES, ArtifactSpec, BuildInputs, find_formats
from export.onnx_graph import ATTENTION_OPSET, trace
from export.options import PlanOptions
from export.parity import ParityError, Reference, check_parity
from export.precision import cast_model
from infer.engines import Engine, create
from isic.runtime.errors import UserError
from train.config import TrainSettings
from train.model import Classifier, create_model, preprocess_spec

POINTWISE = "test_efficientnet"
"""A network of 1x1 convolutions, two of them wide."""
SIZES = {
    POINTWISE: 64,
    "test_vit3": 64,
    "test_convnext": 64,
    "test_convnext3": 64,
    "eva02_tiny_patch14_224": 56,
}
"""A small network of each family and its image size; test_convnext3 has GRN."""


@cache
def network(name: str) -> tuple[Classifier, Reference]:
    model = create_model(TrainSettings(model=name, pretrained=False, image_size=SIZES[name])).eval()
    images = np.random.default_rng(1).integers(
        0, 256, (25, SIZES[name], SIZES[name], 3), dtype=np.uint8
    )
    return model, Reference(model, images)


def spec_of(name: str, format_name: str, precision: str, **options: object) -> ArtifactSpec:
    return ArtifactSpec(
        config=name,
        fold=0,
        format=format_name,
        precision=precision,
        device="cpu",
        options=PlanOptions.model_validate(options),
    )


def built(model: Classifier, spec: ArtifactSpec, folder: Path) -> Engine:
    """Builds the artifact of a network that has the name of the spec's config."""
    size = SIZES[spec.config]
    settings = TrainSettings(model=spec.config, pretrained=False, image_size=size)
    path = folder / FORMATS[spec.format].file_name(spec)
    inputs = BuildInputs(model, preprocess_spec(settings), cache_dir=folder)
    facts = FORMATS[spec.format].build(spec, inputs, path)
    return create(path, {**spec.facts, "preprocess": {"size": size}, **facts}, "cpu")


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "fp16") for name in SIZES),
        ("test_vit3", "int8"),
        ("test_convnext", "int8"),
        (POINTWISE, "int8"),
    ],
)
def test_onnx_passes_the_gate(name: str, precision: str, tmp_path: Path) -> None:
    model, reference = network(name)
    spec = spec_of(name, "onnx", precision)
    engine = built(model, spec, tmp_path)
    assert check_parity(reference, engine, TOLERANCES[precision], spec.batch_sizes)
    whole, alone = engine.run(reference.images)[0], engine.run(reference.images[3:4])[0]
    np.testing.assert_array_equal(
        whole[3:4], alone, "an image's features are its own, whatever the batch"
    )
    said = {
        prop.key: prop.value for prop in onnx.load(next(tmp_path.glob("*.onnx"))).metadata_props
    }
    assert (
        said["name"] == name and said["precision"] == precision and '"size":' in said["preprocess"]
    )


def test_wide_1x1_convolutions_are_quantized(tmp_path: Path) -> None:
    model, _ = network(POINTWISE)
    names = {name for name, _ in model.named_parameters()}
    built(model, spec_of(POINTWISE, "onnx", "int8"), tmp_path)
    products = [node.op_type for node in onnx.load(next(tmp_path.glob("*.onnx"))).graph.node]
    assert products.count("MatMulInteger") >= 2 and "Conv" in products, (
        "the narrow and the spatial ones stay"
    )
    assert names == {name for name, _ in model.named_parameters()}, "the model itself is left alone"


def test_an_engine_is_freed_once_nobody_holds_it(tmp_path: Path) -> None:
    model, reference = network(POINTWISE)
    engine = built(model, spec_of(POINTWISE, "onnx", "fp32"), tmp_path)
    engine.run(reference.images)
    gc.disable()  # a session must not wait for the garbage collector
    try:
        held = weakref.ref(engine)
        del engine
        assert held() is None
    finally:
        gc.enable()


def test_aoti_passes_the_gate(tmp_path: Path) -> None:
    model, reference = network("test_convnext3")
    spec = spec_of("test_convnext3", "aoti", "bf16", max_batch=16, opt_batch=8)
    engine = built(model, spec, tmp_path)
    assert check_parity(reference, engine, TOLERANCES["bf16"], spec.batch_sizes)
    whole, pieces = (
        engine.run(reference.images),
        [engine.run(part) for part in np.split(reference.images, 4)],
    )
    np.testing.assert_allclose(
        whole[1], np.concatenate([logits for _, logits in pieces]), atol=1e-2
    )


@pytest.mark.parametrize("opset", [20, ATTENTION_OPSET])
@pytest.mark.parametrize("name", ["test_vit3", "test_convnext3"])
def test_normalisation_and_softmax_stay_in_float32(name: str, opset: int) -> None:
    graph = onnx.shape_inference.infer_shapes(
        trace(cast_model(network(name)[0], "fp16"), SIZES[name], opset)
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
    assert seen.get("Softmax", {single}) == {single} and seen.get("ReduceL2", {single}) <= {
        single,
        onnx.TensorProto.INT64,
    }
    assert half in seen["MatMul"], "the work itself is in float16"


def test_a_saturated_norm_fails_the_gate(tmp_path: Path) -> None:
    """Activations beyond float16's range are what the float32 islands cannot save."""
    model, _ = network("test_vit3")
    loud = cast_model(model, "fp32")
    loud.backbone.blocks[0].mlp.fc2.weight.data *= 1e6  # type: ignore[index, union-attr]
    images = np.random.default_rng(1).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    engine = built(loud, spec_of("test_vit3", "onnx", "fp16"), tmp_path)
    with pytest.raises(ParityError, match=r"not finite|cosine"):
        check_parity(Reference(loud, images), engine, TOLERANCES["fp16"], (1, 8))


class Fixed:
    """An engine that says what it was told."""

    device = "cpu"

    def __init__(self, reference: Reference, logits: NDArray[np.float32]) -> None:
        self.answers = dict(
            zip((image.tobytes() for image in reference.images), logits, strict=True)
        )
        self.features = dict(zip(self.answers, reference.outputs[0], strict=True))

    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        keys = [image.tobytes() for image in images]
        return np.stack([self.features[key] for key in keys]), np.stack(
            [self.answers[key] for key in keys]
        )


def test_the_order_of_the_logits_counts_and_so_does_the_score() -> None:
    model, plain = network("test_vit3")
    order = plain.outputs[1][: plain.num_real, 0].argsort()
    labels = np.zeros(plain.num_real, np.float32)
    labels[order[-12:]] = 1
    reference = Reference(model, plain.images[: plain.num_real], labels)
    tolerance = replace(TOLERANCES["fp32"], max_logit_error=1e9)
    assert (
        check_parity(reference, Fixed(reference, reference.outputs[1]), tolerance, (4,))[
            "pauc_change"
        ]
        == 0
    )
    swapped = reference.outputs[1].copy()
    swapped[[order[0], order[-1]]] = swapped[[order[-1], order[0]]]
    with pytest.raises(ParityError, match="rank correlation"):
        check_parity(reference, Fixed(reference, swapped), tolerance, (4,))
    with pytest.raises(ParityError, match="pAUC changes by -"):
        check_parity(
            reference, Fixed(reference, swapped), replace(tolerance, min_rank_correlation=0.0), (4,)
        )


def test_formats_and_precisions_are_chosen_as_asked() -> None:
    assert find_formats(("onnx", "aoti"), (), "cpu") == [("onnx", "fp32"), ("aoti", "fp32")]
    assert find_formats(("onnx", "tensorrt_rtx"), ("fp32", "fp16"), "cpu") == [
        ("onnx", "fp32"),
        ("onnx", "fp16"),
        ("tensorrt_rtx", "fp32"),
        ("tensorrt_rtx", "fp16"),
    ]
    for formats, precisions, words in (
        (("onxx",), (), 'no format "onxx", did you mean "onnx"'),
        (("onnx",), ("fp15",), 'no precision "fp15", did you mean'),
        (("aoti",), ("int8",), "aoti on cpu offers fp32, bf16, fp16"),
        (("onnx",), ("fp32", "bf16"), "bf16: onnx does not offer it here"),
        (("tensorrt_rtx",), ("int8",), "tensorrt_rtx on cuda offers fp16, bf16, fp32, fp8"),
    ):
        with pytest.raises(UserError, match=words):
            find_formats(formats, precisions, "cpu")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Make torch report a GPU, which this machine lacks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_a_gpu_without_bfloat16_is_not_offered_it(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is pretended."""
    pretend_gpu(monkeypatch, capability)
    for name, kind in FORMATS.items():
        assert ("bf16" in kind.offered("cuda")) == kind.portable
        assert {"cuda"} <= set(kind.precisions) and kind.offered("cuda")[0] != "bf16", name
    assert find_formats(("aoti",), (), "cuda") == [("aoti", "fp16")]
    assert find_formats(("aoti",), ("bf16",), "cpu") == [("aoti", "bf16")], "a CPU has it"
    assert find_formats(("tensorrt_rtx",), ("bf16",), "cuda") == [("tensorrt_rtx", "bf16")], (
        "the plan is for other GPUs"
    )
    words = re.escape(f"8.0 (Ampere) or newer, and Tesla T4 has {capability[0]}.{capability[1]}; ")
    for formats, precisions in (
        (("aoti",), ("bf16",)),
        (("onnx", "aoti"), ("fp16", "bf16")),
        (("tensorrt",), ("bf16", "fp32")),
    ):
        with pytest.raises(UserError, match=f"^--precision bf16: .*{words}use fp16 or fp32$"):
            find_formats(formats, precisions, "cuda")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_newer_gpus_are_offered_bfloat16(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is pretended."""
    pretend_gpu(monkeypatch, capability)
    assert find_formats(("aoti",), (), "cuda") == [("aoti", "bf16")]
    assert all("bf16" in kind.offered("cuda") for kind in FORMATS.values())


@pytest.mark.parametrize("name", ["test_vit3", "test_convnext3"])
def test_an_operator_without_a_kernel_is_named(name: str, tmp_path: Path) -> None:
    """The graph is valid, but ONNX Runtime has no convolution in bfloat16 on a CPU.

    Older versions lack other kernels on CUDA.
    """
    words = (
        r"has no kernel for one of its operators .*NOT_IMPLEMENTED.*Conv.*use another --precision"
    )
    with pytest.raises(UserError, match=words) as raised:
        built(network(name)[0], spec_of(name, "onnx", "bf16"), tmp_path)
    assert "export it again" not in str(raised.value) and "\n" not in str(raised.value)
