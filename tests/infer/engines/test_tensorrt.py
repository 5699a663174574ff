"""The TensorRT engine without a GPU: its refusals are real, its runs are on a fake CUDA."""

import dataclasses
import gc
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from infer.engines import cudart, load, tensorrt
from infer.engines.cudart import CudaError
from infer.engines.tensorrt import AMPERE_PLUS, Plan, Profile, TensorRTEngine, logger
from isic.runtime.errors import UserError
from isic.runtime.files import manifest_path, read_manifest, write_manifest
from tests.support.fake_cuda import (
    FAKE_TRT,
    SHAPES,
    FakeCuda,
    FakeEngine,
    fake_network,
)

PROFILE = Profile(min=2, opt=8, max=16)


def pictures(number: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (number, 4, 4, 3), dtype=np.uint8)


def fake_engine(cuda: FakeCuda, cuda_graph: bool = False) -> tuple[TensorRTEngine, FakeEngine]:
    fake = FakeEngine(cuda, fake_network, PROFILE.max)
    return engine_of(fake, cuda_graph), fake


def engine_of(fake: FakeEngine, cuda_graph: bool) -> TensorRTEngine:
    plan = Plan(cast(ModuleType, FAKE_TRT), fake, portable=False, cuda_graph=cuda_graph)
    return TensorRTEngine(plan, SHAPES, PROFILE, cuda_graph)


def assert_right(engine: TensorRTEngine, number: int) -> None:
    """Run pictures and compare the results with the network's."""
    images = pictures(number, seed=number)
    features, logits = engine.run(images)
    np.testing.assert_array_equal(features, fake_network(images)["features"])
    np.testing.assert_array_equal(logits, fake_network(images)["logits"])


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("pinned", [False, True])
def test_batches_of_any_size_are_right(cuda: FakeCuda, cuda_graph: bool, pinned: bool) -> None:
    """Every piece is computed from its own images, in any order of the two streams."""
    engine, _ = fake_engine(cuda, cuda_graph)
    for number in (0, 1, 2, 3, 8, 9, 16, 17, 24, 61):
        images = (
            engine.allocate((number, 4, 4, 3)) if pinned else np.empty((number, 4, 4, 3), np.uint8)
        )
        images[:] = pictures(number, seed=number)
        features, logits = engine.run(images)
        expected = fake_network(images)
        np.testing.assert_array_equal(features, expected["features"])
        np.testing.assert_array_equal(logits, expected["logits"])
        np.testing.assert_array_equal(engine.predict_mask(images), expected["mask"])


def test_a_batch_over_the_profile_goes_in_pieces_and_the_tail_is_padded(cuda: FakeCuda) -> None:
    engine, fake = fake_engine(cuda)
    engine.run(pictures(21))
    assert fake.batches == [8, 8, 8]  # the last with five images
    engine.run(pictures(16))
    assert fake.batches[3:] == [16]


def test_the_full_batch_replays_a_cuda_graph(cuda: FakeCuda) -> None:
    engine, fake = fake_engine(cuda, cuda_graph=True)
    recorded = len(fake.batches)
    engine.run(pictures(40))
    assert cuda.replays == 5
    assert len(fake.batches) == recorded
    engine.run(pictures(3))
    assert cuda.replays == 5
    assert fake.batches[recorded:] == [4]


def test_a_graph_is_right_after_batches_of_other_sizes(cuda: FakeCuda) -> None:
    """The fake CUDA refuses to replay a graph whose context was used for something else."""
    engine, fake = fake_engine(cuda, cuda_graph=True)
    for number in (40, 3, 40, 16, 1, 8, 61, 24):
        assert_right(engine, number)
    assert cuda.replays == 5 + 5 + 1 + 8 + 3
    assert len(fake.contexts) == 4, "one for each slot, and one for each slot's graph"


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


def test_a_shape_is_set_only_when_the_batch_changes(cuda: FakeCuda) -> None:
    engine, fake = fake_engine(cuda)
    for number in (24, 24, 3, 3, 24):
        assert_right(engine, number)
    assert [context.shapes for context in fake.contexts] == [[8, 4, 8], [8]]


def test_contexts_share_their_scratch_memory(cuda: FakeCuda) -> None:
    _, fake = fake_engine(cuda, cuda_graph=True)
    sizes = [array.size for array in cuda.device.values()]
    assert sizes.count(fake.device_memory_size_v2) == 1


def test_contexts_of_tensorrt_rtx_share_memory_and_keep_their_kernels(cuda: FakeCuda) -> None:
    """The names are TensorRT-RTX's own; the engine is made up, because opening one takes a GPU."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    given: dict[str, Any] = {}
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    config = SimpleNamespace(
        set_execution_context_allocation_strategy=lambda value: given.update(strategy=value)
    )
    context = FakeEngine(cuda, fake_network, PROFILE.max).create_execution_context(int(strategy))
    engine = SimpleNamespace(
        device_memory_size_v2=1000,
        create_runtime_config=lambda: config,
        create_execution_context=lambda config: given.update(config=config) or context,
    )
    Plan(trt, engine, portable=True, cuda_graph=True).create_context()
    assert given == {"strategy": strategy, "config": config}
    kernels = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert config.dynamic_shapes_kernel_specialization_strategy == kernels
    assert config.cuda_graph_strategy == trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    config = SimpleNamespace(**vars(config))
    del config.cuda_graph_strategy
    Plan(trt, engine, portable=True, cuda_graph=False).create_context()
    assert not hasattr(config, "cuda_graph_strategy")
    engine.create_execution_context = lambda config: None
    logger(trt).errors.clear()  # those of plans that other tests built
    with pytest.raises(CudaError, match="it gives no reason"):
        Plan(trt, engine, portable=True, cuda_graph=False).create_context()


@pytest.mark.parametrize("fails_from", [0, 1, 2, 3])
def test_an_error_while_recording_ends_the_recording(cuda: FakeCuda, fails_from: int) -> None:
    """In the fake CUDA a stream that is left recording refuses all later calls."""
    fake = FakeEngine(cuda, fake_network, PROFILE.max)
    fake.fails_from = fails_from
    with pytest.raises(CudaError, match="did not run a batch of 8"):
        engine_of(fake, cuda_graph=True)
    assert not any(stream.recording for stream in cuda.streams.values())
    gc.collect()
    assert not cuda.graphs
    fake.fails_from = None
    assert_right(engine_of(fake, cuda_graph=True), 21)


def test_a_batch_that_fails_halfway_leaves_nothing_in_flight(cuda: FakeCuda) -> None:
    """The fake CUDA refuses to reuse memory in flight."""
    engine, fake = fake_engine(cuda)
    for fails_from in range(3):
        fake.fails_from = len(fake.batches) + fails_from
        with pytest.raises(CudaError, match="did not run a batch of 8"):
            engine.run(pictures(40, seed=1))
        fake.fails_from = None
        assert_right(engine, 40)


def test_pinned_images_are_not_copied_on_the_host(cuda: FakeCuda) -> None:
    engine, _ = fake_engine(cuda)
    images = engine.allocate((8, 4, 4, 3))
    before = len(cuda.host)
    engine.run(images)
    assert len(cuda.host) == before
    engine.run(images[:, ::-1])  # page-locked, but not in one run of bytes
    engine.run(pictures(8))
    assert len(cuda.host) > before


def test_memory_is_freed_and_outlives_the_engine_where_it_is_in_use(cuda: FakeCuda) -> None:
    engine, _ = fake_engine(cuda)
    images = engine.allocate((3, 4, 4, 3))[1:]
    engine.run(images)
    del engine
    gc.collect()
    assert not cuda.device
    assert len(cuda.host) == 1
    images[:] = 1
    del images
    gc.collect()
    assert not cuda.host


def test_pieces_cover_a_batch_and_padding_takes_few_sizes() -> None:
    profile = Profile(min=1, opt=48, max=200)
    for number in (0, 1, 47, 200, 201, 1000):
        pieces = list(profile.pieces(number))
        assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(
            range(number)
        )
        assert all(piece.stop - piece.start <= profile.max for piece in pieces)
    assert len(list(profile.pieces(200))) == 1
    padded = {number: profile.padded(number) for number in range(1, 201)}
    assert all(number <= size <= 200 for number, size in padded.items())
    assert sorted(set(padded.values())) == [1, 2, 4, 8, 16, 32, 48, 64, 128, 200]
    assert Profile(min=8, opt=8, max=8).padded(1) == 8


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
        tensorrt.create(path, manifest, device)
    text = str(raised.value)
    assert "\n" not in text
    return text


COMMAND = "python -m export --config tiny --fold 0 --formats tensorrt_rtx --precision fp32"


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
        tensorrt.deserialize(trt, trt.Runtime(tensorrt.logger(trt)), built, half, "build it again")


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
    shapes, profile = tensorrt.check_engine(right, Path("a.plan"), 8, "")
    assert profile == Profile(1, 4, 8)
    assert shapes["features"] == (5,)
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
        "try: tensorrt.create(path, read_manifest(path), 'cuda')\n"
        "except ValueError as error: print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
