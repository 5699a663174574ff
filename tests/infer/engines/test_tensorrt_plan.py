"""Batch sizes, execution contexts and kept kernels of TensorRT plans, without a GPU."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infer.engines import cudart
from infer.engines.cudart import CudaError
from infer.engines.tensorrt_plan import (
    KernelCache,
    Plan,
    PlanSettings,
    Profile,
    common_profile,
    logger,
)
from tests.support.fake_cuda import FakeCuda, FakeEngine, fake_network
from tests.support.tensorrt_plans import PROFILE, FakePlan


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


def test_the_common_profile_fits_every_plan() -> None:
    assert common_profile([PROFILE]) == PROFILE
    assert common_profile([Profile(1, 8, 16), Profile(4, 12, 64)]) == Profile(4, 8, 16)
    assert common_profile([Profile(1, 2, 16), Profile(4, 12, 64)]) == Profile(4, 4, 16)
    assert common_profile([Profile(1, 2, 4), Profile(8, 8, 8)]) is None


class FakeRuntimeCache:
    """TensorRT-RTX's cache of kernels, which accepts bytes that begin with `gpu`."""

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, content: bytes) -> bool:
        is_known = content.startswith(b"gpu")
        self.content = content if is_known else b""
        return is_known

    def serialize(self) -> bytes:
        return self.content


@pytest.fixture
def kernels() -> FakeRuntimeCache:
    return FakeRuntimeCache()


def cache_in(path: Path, kernels: FakeRuntimeCache) -> KernelCache:
    given: list[FakeRuntimeCache] = []
    config = SimpleNamespace(create_runtime_cache=lambda: kernels, set_runtime_cache=given.append)
    cache = KernelCache(config, path)
    assert given == [kernels]
    return cache


def test_compiled_kernels_are_kept_for_the_next_start(
    tmp_path: Path, kernels: FakeRuntimeCache
) -> None:
    path = tmp_path / "model.plan.cache"
    cache = cache_in(path, kernels)
    cache.save()
    assert not path.exists(), "there are no kernels yet"
    kernels.content = b"gpu: 8"
    cache.save()
    assert path.read_bytes() == b"gpu: 8"
    again = FakeRuntimeCache()
    cache = cache_in(path, again)
    assert again.content == b"gpu: 8"
    path.unlink()
    cache.save()
    assert not path.exists(), "nothing new to write"


def test_kernels_of_another_gpu_and_damaged_ones_are_replaced(
    tmp_path: Path, kernels: FakeRuntimeCache
) -> None:
    path = tmp_path / "model.plan.cache"
    path.write_bytes(b"other kernels")
    cache = cache_in(path, kernels)
    assert kernels.content == b""
    kernels.content = b"gpu: 8"
    cache.save()
    assert path.read_bytes() == b"gpu: 8"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, kernels: FakeRuntimeCache
) -> None:
    """A file instead of a folder, because the user root can write in any folder."""
    (tmp_path / "file").touch()
    cache = cache_in(tmp_path / "file" / "model.plan.cache", kernels)
    kernels.content = b"gpu: 8"
    cache.save()
    if os.getuid():
        tmp_path.chmod(0o500)
        cache_in(tmp_path / "model.plan.cache", FakeRuntimeCache()).save()
        tmp_path.chmod(0o700)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_tensorrt_rtx_has_the_names_of_the_cache() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert {"create_runtime_cache", "set_runtime_cache"} <= set(dir(trt.IRuntimeConfig))
    assert {"deserialize", "serialize"} <= set(dir(trt.IRuntimeCache))
    assert "nvtx_verbosity" in dir(trt.IExecutionContext)
    assert "NONE" in trt.ProfilingVerbosity.__members__


def test_contexts_of_tensorrt_rtx_share_memory_and_keep_their_kernels(
    cuda: FakeCuda, tmp_path: Path
) -> None:
    """The names are TensorRT-RTX's own; the engine is made up, because opening one takes a GPU."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    made: list[Any] = []
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED

    def create_config() -> Any:
        config = SimpleNamespace(
            set_execution_context_allocation_strategy=made.append,
            create_runtime_cache=FakeRuntimeCache,
            set_runtime_cache=made.append,
        )
        made.append(config)
        return config

    fake = FakeEngine(cuda, fake_network, PROFILE.max)
    engine = SimpleNamespace(
        device_memory_size_v2=1000,
        create_runtime_config=create_config,
        create_execution_context=lambda config: fake.create_execution_context(int(strategy)),
    )
    buffers = {name: cudart.DeviceMemory(1000) for name in ("images", "features", "logits", "mask")}
    scratch = cudart.DeviceMemory(1000)

    def plan(cuda_graph: bool, kernels: Path | None = None) -> Plan:
        settings = PlanSettings(cuda_graph, portable=True, kernels=kernels)
        return Plan(trt, engine, FakePlan().tensors(), PROFILE, settings)

    both = plan(True, tmp_path / "model.plan.cache")
    assert not both.records_graph, "it records graphs by itself"
    contexts = [both.create_context(scratch, buffers) for _ in range(2)]
    config, given_strategy, cache = made  # one for both contexts
    assert len(contexts) == len(fake.contexts) == 2
    assert given_strategy == strategy
    kernels = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert config.dynamic_shapes_kernel_specialization_strategy == kernels
    assert config.cuda_graph_strategy == trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    cache.content = b"gpu"
    both.save_kernels()
    assert (tmp_path / "model.plan.cache").read_bytes() == b"gpu"

    made.clear()
    other = plan(False)
    other.create_context(scratch, buffers)
    config, _ = made
    assert not hasattr(config, "cuda_graph_strategy")
    other.save_kernels()

    engine.create_execution_context = lambda config: None
    logger(trt).errors.clear()  # those of plans that other tests built
    with pytest.raises(CudaError, match="it gives no reason"):
        other.create_context(scratch, buffers)
    logger(trt).log(trt.ILogger.Severity.ERROR, "out of\nmemory")
    with pytest.raises(CudaError, match="creates no context: out of memory"):
        other.create_context(scratch, buffers)


def test_a_context_makes_no_marks_for_profilers_and_refuses_with_tensorrts_reason(
    cuda: FakeCuda,
) -> None:
    fake = FakeEngine(cuda, fake_network, PROFILE.max)
    plan = FakePlan().load(fake)
    buffers = {name: cudart.DeviceMemory(1000) for name in plan.shapes}
    context = plan.create_context(cudart.DeviceMemory(plan.scratch_bytes), buffers)
    assert fake.contexts[0].nvtx_verbosity == 1
    with pytest.raises(CudaError, match="did not accept a batch of 17: it gives no reason"):
        context.enqueue(17, cudart.Stream())
