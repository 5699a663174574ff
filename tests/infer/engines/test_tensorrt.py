"""Loading TensorRT plans: the refusals are real; the plan of one node runs on a fake CUDA."""

import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from infer.engines import cudart, load, tensorrt
from infer.engines.contract import Tensor
from infer.engines.tensorrt import AMPERE_PLUS
from infer.engines.tensorrt_plan import Profile, logger
from isic.runtime.errors import UserError
from isic.runtime.files import manifest_path, read_manifest, write_manifest
from tests.support.fake_cuda import SHAPES, FakeCuda, FakeEngine, fake_network
from tests.support.tensorrt_plans import assert_outputs, pictures


@pytest.fixture
def one_node_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeEngine], None]:
    """Run a plan of one node that TensorRT-RTX has really built on a fake engine."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

    def run(fake: FakeEngine) -> None:
        engine = SimpleNamespace(
            create_execution_context=lambda strategy: fake.create_execution_context(int(strategy)),
            device_memory_size_v2=fake.device_memory_size_v2,
        )
        monkeypatch.setattr(tensorrt, "import_runtime", lambda flavour: trt)
        monkeypatch.setattr(tensorrt, "deserialize", lambda *arguments: engine)
        tensorrt.run_one_node("tensorrt")

    return run


def test_one_node_is_built_and_run(
    cuda: FakeCuda, one_node_on: Callable[[FakeEngine], None]
) -> None:
    fake = FakeEngine(cuda, lambda images: {"features": images.astype(np.float32)}, 1)
    one_node_on(fake)
    assert fake.batches == [1]


def test_one_node_with_a_wrong_result_is_found(
    cuda: FakeCuda, one_node_on: Callable[[FakeEngine], None]
) -> None:
    fake = FakeEngine(cuda, lambda images: {"features": np.zeros(1, np.float32)}, 1)
    with pytest.raises(UserError, match=r"TensorRT computes 0\.0 for 255; run `pip install"):
        one_node_on(fake)


def test_one_node_that_cannot_be_built_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert tensorrt.one_node_plan(trt, "sm89")
    monkeypatch.setattr(cudart, "architecture", lambda: "sm89")
    monkeypatch.setattr(tensorrt, "one_node_plan", lambda trt, architecture: None)
    with pytest.raises(UserError, match=r"TensorRT-RTX builds no plan .*; run `pip install"):
        tensorrt.run_one_node("tensorrt_rtx")


@pytest.fixture(scope="module")
def built(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TensorRT-RTX plan of the tiny run's first fold, built here for real, with its manifest."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from export.options import PlanOptions
    from export.tensorrt import build_plan

    source = exported / "fold_0" / "model.onnx"
    path = tmp_path_factory.mktemp("plan") / "model.plan"
    facts = build_plan(source, path, "tensorrt_rtx", PlanOptions(opt_batch=4, max_batch=8))
    of_source = {key: read_manifest(source)[key] for key in ("name", "fold", "preprocess")}
    write_manifest(
        path, **of_source, format="tensorrt_rtx", precision="fp32", plan=dataclasses.asdict(facts)
    )
    return path


def changed(manifest: dict[str, Any], **plan: Any) -> dict[str, Any]:
    return {**manifest, "plan": {**manifest["plan"], **plan}}


def refusal(path: Path, manifest: dict[str, Any], device: str = "cuda") -> str:
    with pytest.raises(UserError) as raised:
        tensorrt.create({0: path}, {0: manifest}, device)
    text = str(raised.value)
    assert "\n" not in text
    return text


COMMAND = "python -m export --config tiny --fold 0 --formats tensorrt_rtx --precision fp32"


class OpenedEngine(FakeEngine):
    """TensorRT-RTX's engine of a plan of the fake network."""

    num_io_tensors = len(SHAPES)

    def __init__(self, cuda: FakeCuda, fold: int) -> None:
        super().__init__(cuda, partial(fake_network, fold=fold), max_batch=16)
        self.kernels = SimpleNamespace(
            deserialize=lambda content: True, serialize=lambda: str(self.batches).encode()
        )

    def get_tensor_name(self, index: int) -> str:
        return list(SHAPES)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        trt = tensorrt.import_runtime("tensorrt_rtx")
        return trt.DataType.UINT8 if name == "images" else trt.DataType.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *SHAPES[name])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(batch, *SHAPES[name]) for batch in (2, 8, 16)]

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(
            set_execution_context_allocation_strategy=int,
            create_runtime_cache=lambda: self.kernels,
            set_runtime_cache=lambda cache: True,
        )

    def create_execution_context(self, config: Any) -> Any:
        return super().create_execution_context(2)


def test_plans_of_several_folds_become_one_engine(
    cuda: FakeCuda, built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only what takes a GPU is made up: the opened plans, and the GPU's name."""
    opened = [OpenedEngine(cuda, fold) for fold in (0, 1, 0, 1)]
    monkeypatch.setattr(tensorrt, "deserialize", lambda *arguments: opened.pop(0))
    monkeypatch.setattr(cudart, "architecture", lambda: "sm89")
    manifest = changed(read_manifest(built), cuda_graph=True)
    manifest["preprocess"] = {**manifest["preprocess"], "size": 4}
    paths = {fold: tmp_path / f"fold_{fold}" / "model.plan" for fold in (0, 1)}
    for path in paths.values():
        path.parent.mkdir()
        path.write_bytes(built.read_bytes())
    manifests = dict.fromkeys(paths, manifest)
    engine = tensorrt.create(paths, manifests, "cuda")
    images = pictures(21)
    assert_outputs(engine.submit(images).result(), images)
    assert cuda.replays == 0, "TensorRT-RTX records graphs by itself"
    for path in paths.values():
        assert path.with_name("model.plan.sm89.cache").read_bytes() == b"[8]"
    cuda.capacity = 100
    with pytest.raises(UserError, match=r"out of memory\); use fewer folds, or build it again"):
        tensorrt.create(paths, manifests, "cuda")


def test_what_the_manifest_rules_out_is_refused(built: Path) -> None:
    manifest = read_manifest(built)
    version = manifest["plan"]["version"]
    other = refusal(built, changed(manifest, version="1.0.0.5"))
    assert "built by TensorRT-RTX 1.0.0.5" in other
    assert version in other
    assert f"{COMMAND} --force" in other
    ungated = refusal(built, {**manifest, "parity": None})
    assert "has not passed the parity check" in ungated
    assert f"`{COMMAND} --check`" in ungated
    elsewhere = tensorrt.export_command(Path("runs/a/fold_0/model.plan"), manifest)
    assert elsewhere.startswith("python -m export --config tiny --model_dir runs/a --fold 0 ")
    assert "use --device cuda" in refusal(built, manifest, device="cpu")
    del manifest["plan"]
    assert "does not name the plan's library and GPUs" in refusal(built, manifest)


def test_version_compatible_plans_run_in_later_versions_of_one_major() -> None:
    plan = {"version": "10.14.1.48", "version_compatible": True}
    manifest = {"format": "tensorrt", "plan": plan}
    for version in ("10.14.1.48", "10.16.0.1"):
        tensorrt.check_manifest(Path("a.plan"), manifest, version, "")
    for version in ("10.13.0.1", "11.0.0.1"):
        with pytest.raises(UserError, match="was built by TensorRT 10"):
            tensorrt.check_manifest(Path("a.plan"), manifest, version, "")
    plan["version_compatible"] = False
    with pytest.raises(UserError, match=r"was built by TensorRT 10\.14\.1\.48, and this is 10\.16"):
        tensorrt.check_manifest(Path("a.plan"), manifest, "10.16.0.1", "")


def test_a_plan_for_another_gpu_is_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is a name here, because this machine has none; the plan and the refusal are real."""
    monkeypatch.setattr(tensorrt, "no_gpu_reason", lambda: None)
    for gpu in ("sm75", "sm80"):
        monkeypatch.setattr(cudart, "architecture", lambda gpu=gpu: gpu)
        assert tensorrt.unavailable_reason("tensorrt_rtx") is None, "plans can be built for it"
        assert f"was built for sm86 and sm89 and sm120, and this GPU is {gpu}" in refusal(
            built, read_manifest(built)
        )
    for architectures, here in (([AMPERE_PLUS], "sm120"), (["sm80", "sm89"], "sm89")):
        tensorrt.check_architecture(built, architectures, here, "")
    with pytest.raises(UserError, match="built for sm80 and sm89, and this GPU is sm90"):
        tensorrt.check_architecture(built, ["sm80", "sm89"], "sm90", "")


def test_a_gpu_that_tensorrt_rtx_does_not_know_is_refused(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is a name here too. It is newer than Ampere, and the plan is for Ampere and newer."""
    monkeypatch.setattr(cudart, "architecture", lambda: "sm90")
    message = refusal(built, read_manifest(built))
    assert message.startswith("TensorRT-RTX runs on sm75, sm80")
    assert message.endswith("and not on sm90; use another format there")
    monkeypatch.setattr(tensorrt, "no_gpu_reason", lambda: None)
    assert tensorrt.unavailable_reason("tensorrt_rtx") == message
    monkeypatch.setattr(cudart, "architecture", lambda: "sm89")
    assert tensorrt.unavailable_reason("tensorrt_rtx") is None


def test_a_damaged_plan_is_refused(built: Path, tmp_path: Path) -> None:
    plan, fields = built.read_bytes(), read_manifest(built)
    path = tmp_path / "model.plan"
    path.write_bytes(plan[: len(plan) // 2])
    manifest_path(path).write_bytes(manifest_path(built).read_bytes())
    with pytest.raises(UserError, match="does not match its manifest"):
        load(path, "cuda")
    path.write_bytes(b"not a plan" * 100)
    assert "is damaged or not a plan" in refusal(path, fields)


def test_what_tensorrt_does_not_load_is_refused_with_its_reason(built: Path) -> None:
    trt = tensorrt.import_runtime("tensorrt_rtx")
    half = built.read_bytes()[:-1000]
    with pytest.raises(UserError, match=r"model\.plan does not load \(.+\); build it"):
        tensorrt.deserialize(trt, trt.Runtime(logger(trt)), built, half, "build it again")


def test_another_contract_is_refused() -> None:
    """The engine's description is made up, because TensorRT needs a GPU to open a plan."""
    trt = (
        tensorrt.import_runtime("tensorrt_rtx")
        if importlib.util.find_spec("tensorrt_rtx")
        else None
    )
    if trt is None:
        pytest.skip("TensorRT-RTX is not installed")

    def described(**types: Any) -> Any:
        shapes = {"images": (-1, 8, 8, 3), "features": (-1, 5), "logits": (-1, 1)}
        return SimpleNamespace(
            num_io_tensors=len(types),
            get_tensor_name=list(types).__getitem__,
            get_tensor_dtype=types.__getitem__,
            get_tensor_shape=shapes.__getitem__,
            get_tensor_profile_shape=lambda name, profile: [
                (batch, 8, 8, 3) for batch in (1, 4, 8)
            ],
        )

    uint8, half, single = trt.DataType.UINT8, trt.DataType.HALF, trt.DataType.FLOAT
    right = described(images=uint8, features=single, logits=single)
    tensors, profile = tensorrt.check_engine(right, Path("a.plan"), 8, "")
    assert profile == Profile(1, 4, 8)
    assert tensors["features"] == Tensor("float32", (None, 5))
    tensorrt.check_engine(described(images=uint8, features=half, logits=single), Path("a"), 8, "")
    for engine, size, words in (
        (right, 9, r"has images uint8 \[N, 8, 8, 3\], not uint8 \[N, 9, 9, 3\]"),
        (
            described(images=uint8, features=half, logits=half),
            8,
            r"logits float16 \[N, 1\], not float32",
        ),
        (
            described(images=uint8, features=single),
            8,
            "a.plan has images, features, not images, features, logits",
        ),
    ):
        with pytest.raises(UserError, match=words):
            tensorrt.check_engine(engine, Path("a.plan"), size, "")


def test_no_gpu_is_one_sentence(built: Path) -> None:
    if tensorrt.unavailable_reason("tensorrt_rtx") is None:
        pytest.skip("there is a GPU here")
    message = refusal(built, read_manifest(built))
    assert message.startswith("TensorRT does not run here: ")
    assert message.endswith(", or use the format onnx")
    assert str(tensorrt.unavailable_reason("tensorrt_rtx")) in message


def test_a_missing_package_is_named(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(built)
    if importlib.util.find_spec("tensorrt") is None:
        command = 'run `pip install "isic-toolkit[tensorrt]"`'
        assert command in refusal(built, {**manifest, "format": "tensorrt"})
        monkeypatch.setattr(tensorrt, "no_gpu_reason", lambda: None)
        assert command in str(tensorrt.unavailable_reason("tensorrt"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    cudart.runtime.cache_clear()
    assert "pip install cuda-bindings" in refusal(built, manifest)
    cudart.runtime.cache_clear()


def test_the_engine_needs_no_torch(built: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from infer.engines import tensorrt; from isic.runtime.files import read_manifest\n"
        f"path = Path({str(built)!r})\n"
        "try: tensorrt.create({0: path}, {0: read_manifest(path)}, 'cuda')\n"
        "except ValueError as error: print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
