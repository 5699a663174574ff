"""The fake CUDA refuses undefined behaviour of CUDA and TensorRT; other tests rely on that."""

import gc

import numpy as np
import pytest

from tests.support.fake_cuda import (
    SHAPES,
    FakeContext,
    FakeCuda,
    FakeEngine,
    FakeStream,
    Kind,
    Misuse,
    fake_network,
)

UPLOAD, DOWNLOAD = Kind.cudaMemcpyHostToDevice, Kind.cudaMemcpyDeviceToHost
BLOCKING = FakeCuda.cudaEventBlockingSync


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def streams(fake: FakeCuda) -> tuple[FakeStream, FakeStream]:
    return fake.cudaStreamCreateWithFlags(1)[1], fake.cudaStreamCreateWithFlags(1)[1]


def context_on(fake: FakeCuda, scratch: int | None = None) -> FakeContext:
    """An execution context with memory of its own, for a batch of 8."""
    context = FakeEngine(fake, fake_network, max_batch=16).create_execution_context(2)
    context.set_device_memory(scratch or fake.cudaMalloc(1000)[1], 1000)
    for name in SHAPES:
        context.set_tensor_address(name, fake.cudaMalloc(1000)[1])
    context.set_input_shape("images", (8, 4, 4, 3))
    return context


def test_unordered_work_on_one_memory_is_refused(
    fake: FakeCuda, streams: tuple[FakeStream, FakeStream]
) -> None:
    one, two = streams
    (_, host), (_, device) = fake.cudaHostAlloc(64, 0), fake.cudaMalloc(64)
    fake.cudaMemcpyAsync(device, host, 64, UPLOAD, one)
    with pytest.raises(Misuse, match="download does not wait for upload"):
        fake.cudaMemcpyAsync(host, device, 64, DOWNLOAD, two)
    _, event = fake.cudaEventCreateWithFlags(BLOCKING)
    fake.cudaEventRecord(event, one)
    fake.cudaStreamWaitEvent(two, event, 0)
    fake.cudaMemcpyAsync(host, device, 64, DOWNLOAD, two)
    with pytest.raises(Misuse, match="free does not wait for upload"):
        fake.cudaFree(device)


def test_memory_that_a_copy_cannot_use_is_refused(
    fake: FakeCuda, streams: tuple[FakeStream, FakeStream]
) -> None:
    (_, host), (_, device) = fake.cudaHostAlloc(64, 0), fake.cudaMalloc(64)
    assert device % 256 == 0
    assert device % 512, "aligned as promised and no more"
    pageable = np.zeros(64, np.uint8)
    with pytest.raises(Misuse, match="outside page-locked host memory and memory of the GPU"):
        fake.cudaMemcpyAsync(device, pageable.ctypes.data, 64, UPLOAD, streams[0])
    fake.register(pageable)
    fake.cudaMemcpyAsync(device, pageable.ctypes.data, 64, UPLOAD, streams[0])
    fake.cudaStreamSynchronize(streams[0])
    fake.cudaFree(device)
    with pytest.raises(Misuse, match="outside page-locked host memory and memory of the GPU"):
        fake.cudaMemcpyAsync(device, host, 64, UPLOAD, streams[0])


def test_host_memory_is_not_to_be_rewritten_in_flight(
    fake: FakeCuda, streams: tuple[FakeStream, FakeStream]
) -> None:
    (_, host), (_, device) = fake.cudaHostAlloc(64, 0), fake.cudaMalloc(64)
    fake.cudaMemcpyAsync(device, host, 64, UPLOAD, streams[0])
    fake.host[host][:] = 1
    with pytest.raises(Misuse, match="rewritten before its copy"):
        fake.cudaStreamSynchronize(streams[0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_memory_of_the_caller_is_not_to_end_in_flight(
    fake: FakeCuda, streams: tuple[FakeStream, FakeStream]
) -> None:
    _, device = fake.cudaMalloc(64)
    images = np.zeros(64, np.uint8)
    fake.register(images)
    fake.cudaMemcpyAsync(device, images.ctypes.data, 64, UPLOAD, streams[0])
    del images
    assert fake.misuses == ["free does not wait for upload"]


def test_outputs_are_not_to_be_overwritten_unseen(
    fake: FakeCuda, streams: tuple[FakeStream, FakeStream]
) -> None:
    (_, host), (_, device) = fake.cudaHostAlloc(64, 0), fake.cudaMalloc(64)
    fake.device[device][:] = 7
    fake.cudaMemcpyAsync(host, device, 64, DOWNLOAD, streams[0])
    assert not (fake.host[host] == 7).any(), "the host has not waited"
    with pytest.raises(Misuse, match="overwritten before the host has waited"):
        fake.cudaMemcpyAsync(host + 32, device, 32, DOWNLOAD, streams[0])
    fake.cudaStreamSynchronize(streams[0])
    assert (fake.host[host] == 7).all()
    fake.cudaMemcpyAsync(host, device, 64, DOWNLOAD, streams[0])


def test_waits_that_spin_are_refused(fake: FakeCuda) -> None:
    _, event = fake.cudaEventCreateWithFlags(FakeCuda.cudaEventDisableTiming)
    with pytest.raises(Misuse, match="the host spins"):
        fake.cudaEventSynchronize(event)


def test_addresses_that_are_not_aligned_are_refused(fake: FakeCuda) -> None:
    context = context_on(fake)
    _, device = fake.cudaMalloc(2000)
    with pytest.raises(Misuse, match="not aligned"):
        context.set_tensor_address("images", device + 16)
    with pytest.raises(Misuse, match="too small or not aligned"):
        context.set_device_memory(device + 16, 1000)
    with pytest.raises(Misuse, match="too small or not aligned"):
        context.set_device_memory(device, 999)


def test_a_context_on_two_streams_is_refused(
    fake: FakeCuda, streams: tuple[FakeStream, FakeStream]
) -> None:
    context = context_on(fake)
    context.execute_async_v3(1)
    with pytest.raises(Misuse, match="a run does not wait for a run"):
        context.execute_async_v3(2)
    fake.cudaStreamSynchronize(streams[0])


def test_contexts_share_scratch_memory_only_in_order(
    fake: FakeCuda, streams: tuple[FakeStream, FakeStream]
) -> None:
    _, scratch = fake.cudaMalloc(1000)
    one, two = context_on(fake, scratch), context_on(fake, scratch)
    one.execute_async_v3(1)
    with pytest.raises(Misuse, match="a run does not wait for a run"):
        two.execute_async_v3(2)
    two.execute_async_v3(1)
    fake.cudaStreamSynchronize(streams[0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_context_that_ends_while_it_runs_is_refused(
    fake: FakeCuda, streams: tuple[FakeStream, FakeStream]
) -> None:
    context = context_on(fake)
    context.execute_async_v3(1)
    fake.cudaStreamSynchronize(streams[0])
    del context
    gc.collect()
    assert not fake.misuses
    context_on(fake).execute_async_v3(1)
    gc.collect()
    assert fake.misuses == ["free does not wait for a run"]


def test_graphs_are_refused_unless_their_context_is_left_alone(
    fake: FakeCuda, streams: tuple[FakeStream, FakeStream]
) -> None:
    context = context_on(fake)
    fake.cudaStreamBeginCapture(streams[0], 1)
    with pytest.raises(Misuse, match="before a run with the context's shape"):
        context.execute_async_v3(1)
    fake.cudaStreamEndCapture(streams[0])
    context.execute_async_v3(1)
    fake.cudaStreamBeginCapture(streams[0], 1)
    context.execute_async_v3(1)
    _, graph = fake.cudaGraphInstantiate(fake.cudaStreamEndCapture(streams[0])[1], 0)
    fake.cudaGraphLaunch(graph, streams[0])
    context.set_input_shape("images", (8, 4, 4, 3))
    with pytest.raises(Misuse, match="context has been used for something else"):
        fake.cudaGraphLaunch(graph, streams[0])
    fake.cudaStreamSynchronize(streams[0])
    del context
    gc.collect()
    with pytest.raises(Misuse, match="a run touches memory that is freed"):
        fake.cudaGraphLaunch(graph, streams[0])


def test_a_broken_gpu_refuses_everything(
    fake: FakeCuda, streams: tuple[FakeStream, FakeStream]
) -> None:
    (_, host), (_, device) = fake.cudaHostAlloc(64, 0), fake.cudaMalloc(64)
    context = context_on(fake)
    _, event = fake.cudaEventCreateWithFlags(BLOCKING)
    fake.is_broken = True
    assert not context.execute_async_v3(1)
    for status, *_ in (
        fake.cudaMalloc(8),
        fake.cudaHostAlloc(8, 0),
        fake.cudaMemcpyAsync(device, host, 64, UPLOAD, streams[0]),
        fake.cudaEventRecord(event, streams[0]),
        fake.cudaStreamWaitEvent(streams[0], event, 0),
        fake.cudaEventSynchronize(event),
        fake.cudaStreamSynchronize(streams[0]),
        fake.cudaFree(device),
    ):
        assert status == 700
    fake.is_broken = False
