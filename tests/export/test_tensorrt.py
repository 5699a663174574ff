"""Plans built for real by TensorRT-RTX, which needs no GPU to build."""

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import timm

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

import train.model
from benchmarks.untrained import create_untrained, find_configs
from export.network import artifact_network
from export.onnx_graph import ATTENTION_OPSET, trace
from export.options import PlanOptions
from export.precision import head_as_sum
from export.tensorrt import (
    PlanFacts,
    architectures,
    build_plan,
    configure,
    parse,
    plan_name,
    read_timings,
    write_timings,
)
from infer.engines import cudart
from infer.engines.tensorrt import import_runtime, unavailable_reason
from infer.engines.tensorrt_plan import logger
from isic.preprocess import PreprocessSpec
from isic.runtime.errors import UserError
from tests.support.networks import with_all_outputs
from train.config import TrainSettings
from train.model import Classifier, create_model
from train.timm_models import backbone_options

RTX = "tensorrt_rtx"
OPTIONS = PlanOptions(opt_batch=4, max_batch=8)
LOW = {"fp16": "float16", "bf16": "bfloat16"}
FAMILIES: dict[str, dict[str, Any]] = {
    "test_vit": {"img_size": 32, "depth": 2},
    "test_convnext3": {},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2},
}
"""A ConvNeXt, and two blocks of a ViT and of an EVA02: the options that make them small."""

SHALLOW: dict[str, dict[str, Any]] = {
    "vit": {"depth": 2},
    "eva02": {"depth": 2},
    "convnext": {"depths": (1, 1, 1, 1)},
}
"""What leaves a backbone its width and its operators, and few blocks, by how its name starts."""


def write_graph(
    model: Classifier, size: int, precision: str, path: Path, tta: str = "none"
) -> Path:
    """Write the graph that the builder of TensorRT-RTX gets."""
    network = artifact_network(head_as_sum(model.eval()), precision, tta)
    onnx.save(trace(network, size, ATTENTION_OPSET), path)
    return path


def graph(name: str, precision: str, path: Path, tta: str = "none") -> Path:
    size = FAMILIES[name].get("img_size", 32)
    backbone = timm.create_model(name, num_classes=0, **FAMILIES[name])
    return write_graph(Classifier(backbone, PreprocessSpec(size=size)), size, precision, path, tta)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 graph with a mask that builds in a second."""
    model = create_model(
        TrainSettings(model="test_efficientnet", pretrained=False, image_size=32, mask_weight=1.0)
    )
    return write_graph(model, 32, "fp16", tmp_path_factory.mktemp("graph") / "model.onnx")


def built(onnx_path: Path, plan: Path, options: PlanOptions = OPTIONS) -> PlanFacts:
    facts = build_plan(onnx_path, plan, RTX, options)
    assert plan.stat().st_size > 100_000
    assert not list(plan.parent.glob(".*"))
    return facts


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", LOW)
def test_every_family_builds_in_its_precision_with_float32_norms(
    name: str, precision: str, tmp_path: Path
) -> None:
    size = FAMILIES[name].get("img_size", 32)
    facts = built(graph(name, precision, tmp_path / "model.onnx"), tmp_path / "model.plan")
    layers = facts.layers
    num_features = facts.tensors["features"]["shape"][1]
    assert facts.tensors == {
        "images": {"dtype": "uint8", "shape": [-1, size, size, 3]},
        "features": {"dtype": "float16", "shape": [-1, num_features]},
        "logits": {"dtype": "float32", "shape": [-1, 1]},
    }
    assert facts.profile == {"min": 1, "opt": 4, "max": 8}
    for kind in ("normalization", "softmax"):
        assert set(layers.get(kind, {})) <= {"float32"}, f"{kind} stays in float32"
    assert layers["normalization"]["float32"] > 4
    assert layers["convolution"] == {LOW[precision]: layers["convolution"][LOW[precision]]}
    assert layers["matrix_multiply"][LOW[precision]] > 4
    assert set(layers["matrix_multiply"]) == {LOW[precision]}, "the head is a sum"


@pytest.mark.slow
@pytest.mark.parametrize("config", find_configs(("all",)))
@pytest.mark.parametrize("precision", LOW)
def test_every_config_builds(
    config: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shallow(settings: TrainSettings) -> dict[str, Any]:
        few = (options for name, options in SHALLOW.items() if settings.model.startswith(name))
        return backbone_options(settings) | next(few, {})

    monkeypatch.setattr(train.model, "backbone_options", shallow)
    fresh = create_untrained(config)
    facts = built(
        write_graph(fresh.model, fresh.spec.size, precision, tmp_path / "model.onnx"),
        tmp_path / "model.plan",
    )
    assert set(facts.tensors) == {"images", *fresh.model.output_names}
    assert facts.tensors["images"]["shape"] == [-1, fresh.spec.size, fresh.spec.size, 3]
    assert facts.tensors["features"] == {
        "dtype": "float16",
        "shape": [-1, fresh.model.num_features],
    }
    assert facts.layers["convolution"] == {
        LOW[precision]: facts.layers["convolution"][LOW[precision]]
    }
    assert set(facts.layers.get("normalization", {})) <= {"float32"}


def test_float32_builds_and_an_attention_without_a_fused_kernel_is_decomposed(
    tmp_path: Path,
) -> None:
    facts = built(graph("test_vit", "fp32", tmp_path / "model.onnx"), tmp_path / "model.plan")
    assert {dtype for counts in facts.layers.values() for dtype in counts} == {"float32"}
    assert "attention_input" in facts.layers


def test_a_mask_is_an_output_too(tiny: Path, tmp_path: Path) -> None:
    assert built(tiny, tmp_path / "model.plan").tensors["mask"] == {
        "dtype": "float32",
        "shape": [-1, 16, 16],
    }


@pytest.mark.slow
@pytest.mark.parametrize("tta", ["none", "flips"])
def test_auxiliary_logits_are_an_output_too(tta: str, tmp_path: Path) -> None:
    source = write_graph(with_all_outputs(), 64, "fp16", tmp_path / "model.onnx", tta=tta)
    facts = built(source, tmp_path / "model.plan")
    assert facts.tensors["aux"] == {"dtype": "float32", "shape": [-1, 2]}
    assert facts.tensors["mask"]["shape"] == [-1, 32, 32]
    assert "float32" not in facts.layers.get("matrix_multiply", {}), "the heads are sums"


@pytest.mark.slow
def test_views_are_part_of_a_plan(tmp_path: Path) -> None:
    model = create_model(
        TrainSettings(model="test_efficientnet", pretrained=False, image_size=32, mask_weight=1.0)
    )
    source = write_graph(model, 32, "fp16", tmp_path / "model.onnx", tta="d4")
    facts = built(source, tmp_path / "model.plan")
    assert {name: tensor["shape"] for name, tensor in facts.tensors.items()} == {
        "images": [-1, 32, 32, 3],
        "features": [-1, model.num_features],
        "logits": [-1, 1],
        "mask": [-1, 16, 16],
    }


def test_architectures_are_named_and_built(tiny: Path, tmp_path: Path) -> None:
    options = OPTIONS.model_copy(update={"compute_capabilities": ("SM80", "SM89", "SM120")})
    facts = built(tiny, tmp_path / "model.plan", options)
    assert facts.architectures == ("sm80", "sm89", "sm120")
    assert architectures(RTX, OPTIONS) == ("sm86", "sm89", "sm120")
    assert (facts.runtime, facts.version) == (RTX, import_runtime(RTX).__version__)


def test_a_plans_name_has_all_that_decides_whether_it_runs() -> None:
    version = import_runtime(RTX).__version__
    name = plan_name("vit_tiny", 3, "bf16", RTX, OPTIONS)
    assert name == f"vit_tiny-fold_3-bf16-sm86-sm89-sm120-tensorrt_rtx_{version}.plan"
    options = OPTIONS.model_copy(update={"compute_capabilities": ("SM80",)})
    assert "-sm80-" in plan_name("vit_tiny", 3, "bf16", RTX, options)
    assert "-bf16-d4-sm86-" in plan_name("vit_tiny", 3, "bf16", RTX, PlanOptions(tta="d4"))


def renamed(source: Path, path: Path, change: str) -> Path:
    model = onnx.load(source)
    if change == "name":
        for node in model.graph.node:
            node.output[:] = ["scores" if name == "logits" else name for name in node.output]
        next(output for output in model.graph.output if output.name == "logits").name = "scores"
    if change == "batch":
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    if change == "dtype":
        half = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT16, ["batch", 1])
        for node in model.graph.node:
            node.output[:] = ["logits_32" if name == "logits" else name for name in node.output]
        model.graph.node.append(
            onnx.helper.make_node("Cast", ["logits_32"], ["logits"], to=onnx.TensorProto.FLOAT16)
        )
        outputs = [half if output.name == "logits" else output for output in model.graph.output]
        del model.graph.output[:]
        model.graph.output.extend(outputs)
    if change == "operator":
        model.graph.node[3].op_type = "NoSuchOperator"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("name", "has images, features, scores, mask, not images, features"),
        ("batch", r"has images uint8 \[4, 32, 32, 3\], not uint8 \[N, "),
        ("dtype", r"has logits float16 \[N, 1\], not float32 \[N, 1\]"),
        ("operator", "cannot read .*NoSuchOperator"),
    ],
)
def test_another_graph_is_refused(tiny: Path, tmp_path: Path, change: str, words: str) -> None:
    source = renamed(tiny, tmp_path / "other.onnx", change)
    with pytest.raises(UserError, match=words) as raised:
        build_plan(source, tmp_path / "model.plan", RTX, OPTIONS)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "model.plan").exists()


TURING = OPTIONS.model_copy(update={"compute_capabilities": ("SM75",)})


@pytest.mark.slow
@pytest.mark.parametrize("tta", ["none", "d4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_float16_network_for_turing_has_no_float32_product(
    name: str, tta: str, tmp_path: Path
) -> None:
    """The ONNX graph that the builder gets, and the plan for SM75, are real."""
    path = graph(name, "fp16", tmp_path / "model.onnx", tta)
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    kinds |= {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    products = [node for node in model.graph.node if node.op_type in {"MatMul", "Gemm"}]
    assert {kinds[name] for node in products for name in node.input} == {onnx.TensorProto.FLOAT16}
    facts = built(path, tmp_path / "model.plan", TURING)
    assert facts.architectures == ("sm75",)
    assert set(facts.layers["matrix_multiply"]) == {"float16"}


def test_networks_that_turing_computes_wrongly_are_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX has no float32 matrix product there, and some versions return zeros for it.

    The GPU of `CURRENT` is a name here, because this machine has none.
    """
    monkeypatch.setattr(cudart, "architecture", lambda: "sm75")
    model = create_model(TrainSettings(model="test_efficientnet", pretrained=False, image_size=32))
    with_product = tmp_path / "head.onnx"
    onnx.save(trace(artifact_network(model.eval(), "fp16"), 32, ATTENTION_OPSET), with_product)
    for names in (("SM75",), ("SM86", "SM75"), ("CURRENT",)):
        options = OPTIONS.model_copy(update={"compute_capabilities": names})
        with pytest.raises(UserError, match=r"a matrix product in float32, .* on sm75 \(Turing\)"):
            build_plan(with_product, tmp_path / "model.plan", RTX, options)
        assert "sm75" in plan_name("vit_tiny", 0, "fp16", RTX, options)
        for precision in ("fp32", "bf16", "fp8"):
            with pytest.raises(UserError, match=f"only fp16 on sm75 .Turing., not {precision}; "):
                plan_name("vit_tiny", 0, precision, RTX, options)
    assert [path.name for path in tmp_path.iterdir()] == ["head.onnx"]
    monkeypatch.setattr(cudart, "architecture", lambda: "sm90")
    with pytest.raises(UserError, match=r"runs on sm75, .*, and not on sm90; use another"):
        build_plan(tiny, tmp_path / "model.plan", RTX, options)


def test_a_gpu_that_this_version_does_not_know_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions of TensorRT-RTX have no SM121, so this one is made to have none."""
    known = import_runtime(RTX).ComputeCapability
    fewer = {name: value for name, value in known.__members__.items() if name != "SM121"}
    monkeypatch.setattr(
        import_runtime(RTX), "ComputeCapability", SimpleNamespace(__members__=fewer)
    )
    options = OPTIONS.model_copy(update={"compute_capabilities": ("SM121",)})
    with pytest.raises(UserError, match="runs on sm75, sm80, sm86, sm89, sm120, and not on sm121"):
        build_plan(tiny, tmp_path / "model.plan", RTX, options)


def test_ctrl_c_ends_a_build_and_leaves_nothing(tmp_path: Path) -> None:
    source = graph("test_vit", "fp16", tmp_path / "model.onnx")
    previous = signal.getsignal(signal.SIGINT)
    presser = threading.Thread(target=_press_ctrl_c_during_the_build)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        build_plan(source, tmp_path / "model.plan", RTX, OPTIONS)
    presser.join()
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert signal.getsignal(signal.SIGINT) is previous


def _press_ctrl_c_during_the_build() -> None:
    """Wait until the build listens, which is when its handler is installed."""
    before = signal.getsignal(signal.SIGINT)
    while signal.getsignal(signal.SIGINT) is before:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGINT)


def test_timings_are_kept_for_the_next_fold(tiny: Path, tmp_path: Path) -> None:
    """TensorRT-RTX has the calls but times nothing, so this tests only the file."""
    trt = import_runtime(RTX)
    builder = trt.Builder(logger(trt))
    network, _parser = parse(trt, builder, tiny, "TensorRT")
    path, messages = tmp_path / "timings.cache", []
    for _ in range(2):
        config = configure(trt, builder, network, True, OPTIONS)
        read_timings(config, path, messages.append)
        write_timings(config, path)
    assert path.stat().st_size > 0
    assert not messages


@pytest.mark.parametrize("refuses", ["create_timing_cache", "set_timing_cache"])
def test_timings_that_tensorrt_refuses_are_measured_again(tmp_path: Path, refuses: str) -> None:
    """The builder's configuration is made up, because TensorRT-RTX accepts any timings."""
    path, messages, kept = tmp_path / "timings.cache", [], []
    path.write_bytes(b"damaged")

    def create(timings: bytes) -> Any:
        is_refused = refuses == "create_timing_cache" and timings == b"damaged"
        return None if is_refused else SimpleNamespace(serialize=lambda: timings + b"new")

    def keep(cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.serialize().startswith(b"damaged"):
            return False
        kept.append(cache)
        return True

    config = SimpleNamespace(
        create_timing_cache=create,
        set_timing_cache=keep,
        get_timing_cache=lambda: kept[-1] if kept else None,
    )
    write_timings(config, path)
    assert path.read_bytes() == b"damaged", "there are no timings to write"
    read_timings(config, path, messages.append)
    write_timings(config, path)
    assert path.read_bytes() == b"new"
    assert messages == [
        f"{path} is damaged or of another GPU or TensorRT version: kernels are timed again"
    ]


def test_a_missing_gpu_or_library_is_reported(tiny: Path, tmp_path: Path) -> None:
    reason = unavailable_reason("tensorrt")
    if reason is None:
        pytest.skip("TensorRT and a GPU are here")
    with pytest.raises(UserError) as raised:
        build_plan(tiny, tmp_path / "model.plan", "tensorrt", OPTIONS)
    assert "; " in str(raised.value)
    if unavailable_reason(RTX) is not None:
        with pytest.raises(UserError, match="TensorRT does not run here: "):
            build_plan(
                tiny, tmp_path / "model.plan", RTX, PlanOptions(compute_capabilities=("CURRENT",))
            )
