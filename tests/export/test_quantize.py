"""int8 and fp8 graphs: their numerics in ONNX Runtime, and plans built by TensorRT-RTX."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from export import tensorrt
from export.formats import TOLERANCES
from export.network import artifact_network
from export.onnx_graph import ATTENTION_OPSET, trace
from export.options import PlanOptions
from export.parity import Reference, check_parity
from export.quantize import BASE_PRECISION, QUANT_TYPES, quantize
from export.tensorrt import build_plan, plan_name, with_capabilities
from infer.engines import create
from infer.engines.tensorrt import import_runtime
from infer.engines.tensorrt_plan import logger
from isic.preprocess import PreprocessSpec
from isic.runtime.errors import UserError
from train.config import TrainSettings
from train.model import Classifier, create_model

RTX = "tensorrt_rtx"


FAMILIES: dict[str, dict[str, Any]] = {
    "test_vit": {"img_size": 32, "depth": 2},
    "test_convnext3": {},
    "eva02_base_patch14_448": {"img_size": 28, "depth": 1},
}
"""A ViT, a ConvNeXt, and an EVA02, whose query, key and value share one activation."""


NUM_PRODUCTS = {"test_vit": 8, "test_convnext3": 8, "eva02_base_patch14_448": 7}
"""Matrix products with weights, without the head."""


def images_of(size: int, count: int, seed: int) -> NDArray[np.uint8]:
    """Smooth images, whose activations are more like those of photographs than noise's are."""
    coarse = np.random.default_rng(seed).random((count, 3, 4, 4), dtype=np.float32)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), (size, size), mode="bicubic")
    return (smooth.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@cache
def network(name: str) -> Classifier:
    torch.manual_seed(0)
    options = FAMILIES[name]
    model = Classifier(
        timm.create_model(name, num_classes=0, **options), PreprocessSpec(size=size_of(name))
    ).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.5)  # or the branches of a ConvNeXt would not count
    return model


def size_of(name: str) -> int:
    return int(FAMILIES[name].get("img_size", 32))


@cache
def base_graph(name: str) -> bytes:
    traced: bytes = trace(
        artifact_network(network(name), BASE_PRECISION), size_of(name), ATTENTION_OPSET
    ).SerializeToString()
    return traced


def quantized(name: str, precision: str, path: Path) -> onnx.ModelProto:
    graph = onnx.load_from_string(base_graph(name))
    quantize(graph, precision, images_of(size_of(name), 16, seed=1))
    onnx.checker.check_model(graph)
    onnx.save(graph, path)
    return graph


@pytest.mark.slow
@pytest.mark.parametrize("precision", QUANT_TYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_graph_passes_the_parity_check_on_unseen_images(
    name: str, precision: str, tmp_path: Path
) -> None:
    quantized(name, precision, tmp_path / "model.onnx")
    engine = create(
        tmp_path / "model.onnx", {"format": "onnx", "preprocess": {"size": size_of(name)}}, "cpu"
    )
    reference = Reference(network(name), images_of(size_of(name), 32, seed=2))
    worst = check_parity(reference, engine, TOLERANCES[precision], (1, 8))["batch_8"]
    assert worst["cosine"] < 0.999999, "it is quantized"


@pytest.mark.parametrize("precision", QUANT_TYPES)
@pytest.mark.parametrize("name", ["test_vit", "test_convnext3"])
def test_what_is_quantized_and_how(name: str, precision: str, tmp_path: Path) -> None:
    graph = quantized(name, precision, tmp_path / "model.onnx").graph
    kind = QUANT_TYPES[precision]
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {node.output[0]: node for node in graph.node}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    low = [node for node in products if node.input[0].endswith("_dequantized")]
    for node in low:
        activation, weight = (producers[tensor] for tensor in node.input[:2])
        assert (activation.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert producers[activation.input[0]].op_type == "QuantizeLinear"
        assert constants[weight.input[0]].data_type == kind.code, "weights are stored quantized"
        for pair in (activation, weight):
            scale, zero = (constants[tensor] for tensor in pair.input[1:])
            assert scale.data_type == TensorProto.FLOAT16
            assert zero.data_type == kind.code
            assert not any(zero.raw_data)
            assert (numpy_helper.to_array(scale) > 0).all()
        assert list(constants[activation.input[1]].dims) == [], "one scale a tensor"
        assert max(constants[weight.input[0]].dims) >= constants[weight.input[1]].dims[0] > 1, (
            "one a channel"
        )
        assert all(constants[bias].data_type == TensorProto.FLOAT16 for bias in node.input[2:])
    rest = [node for node in products if node not in low]
    assert sum(node.op_type == "Gemm" for node in rest) == 1, "the head"
    assert all(
        constants[node.input[1]].dims[1] < 16
        for node in rest
        if node.op_type == "Conv" and precision == "int8"
    )
    assert len(low) == 8 + (3 if name == "test_convnext3" and precision == "int8" else 0)
    assert (
        next(
            node for node in graph.node if "images" in node.input and node.op_type != "Shape"
        ).op_type
        == "Cast"
    )


def test_a_quantized_weight_is_within_half_a_step(tmp_path: Path) -> None:
    before = {
        t.name: t for t in onnx.load_from_string(base_graph("test_convnext3")).graph.initializer
    }
    graph = quantized("test_convnext3", "int8", tmp_path / "model.onnx").graph
    after = {
        tensor.name: numpy_helper.to_array(tensor).astype(np.float32)
        for tensor in graph.initializer
    }
    axes = {
        node.input[0]: node.attribute[0].i
        for node in graph.node
        if node.attribute and node.input[0] in after
    }
    weights = [name.removesuffix("_quantized") for name in after if name.endswith("_quantized")]
    assert len(weights) == 11
    for name in weights:
        codes, scale = after[f"{name}_quantized"], after[f"{name}_scale"]
        shape = [-1 if axis == axes[f"{name}_quantized"] else 1 for axis in range(codes.ndim)]
        step = scale.reshape(shape)
        error = np.abs(codes * step - numpy_helper.to_array(before[name]).astype(np.float32))
        assert (error <= 0.51 * step + 1e-7).all()
        assert np.abs(codes).max() == 127


@pytest.fixture
def build_log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The log of TensorRT-RTX in detail, which ends with every layer that it compiled."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    configure = tensorrt.configure

    def in_detail(*arguments: Any) -> Any:
        config = configure(*arguments)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        return config

    monkeypatch.setattr(tensorrt, "configure", in_detail)
    lines: list[str] = []
    kind = type(logger(trt))
    real = kind.log

    def log(self: Any, severity: Any, message: str) -> None:
        lines.extend(message.splitlines())
        real(self, severity, message)

    monkeypatch.setattr(kind, "log", log)
    return lines


def compiled_products(build_log: list[str]) -> dict[str, str]:
    """Return the type of the first input of each matrix product of a plan, by its name."""
    found = (
        re.match(r"Name: (\S+), LayerType: gemm, Inputs:.*?Datatype: (\w+)", line)
        for line in build_log
    )
    return {match[1]: match[2] for match in found if match}


@pytest.mark.parametrize(
    ("precision", "dtype", "compiled"), [("int8", "int8", "Int8"), ("fp8", "float8", "FP8")]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_compiles_to_products_of_the_quantized_type(
    name: str, precision: str, dtype: str, compiled: str, tmp_path: Path, build_log: list[str]
) -> None:
    quantized(name, precision, tmp_path / "model.onnx")
    options = with_capabilities(precision, RTX, PlanOptions(opt_batch=4, max_batch=8))
    facts = build_plan(tmp_path / "model.onnx", tmp_path / "model.plan", RTX, options)
    assert facts.architectures == (
        ("sm86", "sm89", "sm120") if precision == "int8" else ("sm89", "sm120")
    )
    assert facts.layers["matrix_multiply"] == {dtype: NUM_PRODUCTS[name], "float32": 1}, (
        "all but the head"
    )
    assert {
        kind for dtypes in ("normalization", "softmax") for kind in facts.layers.get(dtypes, {})
    } <= {"float32"}
    products = {
        key: value for key, value in compiled_products(build_log).items() if "MatMul" in key
    }
    assert products
    assert set(products.values()) == {compiled}


def test_fp8_is_not_built_for_gpus_without_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    quantized("test_vit", "fp8", tmp_path / "model.onnx")
    options = PlanOptions(opt_batch=4, max_batch=8, compute_capabilities=("SM80",))
    with pytest.raises(UserError, match=r"cannot build .*sm80.*fp8.*try another --precision"):
        build_plan(tmp_path / "model.onnx", tmp_path / "model.plan", RTX, options)
    version = import_runtime(RTX).__version__
    name = plan_name("a", 0, "fp8", RTX, PlanOptions())
    assert name == f"a-fold_0-fp8-sm89-sm120-{RTX}_{version}.plan"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"], "nothing is left behind"


def test_a_network_that_cannot_be_quantized_is_refused() -> None:
    settings = TrainSettings(model="test_efficientnet", pretrained=False, image_size=32)
    convolutions = trace(
        artifact_network(create_model(settings).eval(), BASE_PRECISION), 32, ATTENTION_OPSET
    )
    with pytest.raises(
        UserError, match="no products to compute in fp8; choose another --precision"
    ):
        quantize(convolutions, "fp8", images_of(32, 4, seed=1))
    with pytest.raises(
        UserError, match="int8 needs images to calibrate on, and there are none; give --data"
    ):
        quantize(convolutions, "int8", images_of(32, 0, seed=1))
    loud = onnx.load_from_string(base_graph("test_vit"))
    norm = next(node.input[1] for node in loud.graph.node if node.op_type == "LayerNormalization")
    weight = next(tensor for tensor in loud.graph.initializer if tensor.name == norm)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + np.float32(1e6), norm))
    with pytest.raises(UserError, match="activations overflow float16"):
        quantize(loud, "int8", images_of(32, 4, seed=1))
