"""The fake CUDA refuses undefined behaviour of CUDA and TensorRT; other tests rely on that."""

import pytest

from tests.support.fake_cuda import SHAPES, FakeCuda, FakeEngine, Kind, Misuse, fake_network


def test_undefined_behaviour_of_cuda_is_refused() -> None:
    fake = FakeCuda()
    (_, one), (_, two) = (fake.cudaStreamCreateWithFlags(0) for _ in range(2))
    (_, host), (_, device) = fake.cudaHostAlloc(64, 0), fake.cudaMalloc(64)
    upload, download = Kind.cudaMemcpyHostToDevice, Kind.cudaMemcpyDeviceToHost
    assert device % 256 == 0
    assert device % 512, "aligned as promised and no more"
    fake.cudaMemcpyAsync(device, host, 64, upload, one)
    with pytest.raises(Misuse, match="download does not wait for upload"):
        fake.cudaMemcpyAsync(host, device, 64, download, two)
    with pytest.raises(Misuse, match="free does not wait for upload"):
        fake.cudaFree(device)
    with pytest.raises(Misuse, match="outside page-locked host memory and memory of the GPU"):
        fake.cudaMemcpyAsync(device, host, 64, upload, one)
    fake.host[host][:] = 1
    with pytest.raises(Misuse, match="rewritten before its copy"):
        fake.cudaStreamSynchronize(one)


def test_undefined_behaviour_of_tensorrt_is_refused() -> None:
    fake = FakeCuda()
    streams = [fake.cudaStreamCreateWithFlags(0)[1] for _ in range(2)]
    context = FakeEngine(fake, fake_network, max_batch=16).create_execution_context(2)
    context.set_device_memory(fake.cudaMalloc(1000)[1], 1000)
    with pytest.raises(Misuse, match="not aligned"):
        context.set_tensor_address("images", fake.cudaMalloc(64)[1] + 16)
    for name in SHAPES:
        context.set_tensor_address(name, fake.cudaMalloc(1000)[1])
    context.set_input_shape("images", (8, 4, 4, 3))
    fake.cudaStreamBeginCapture(streams[0], 1)
    with pytest.raises(Misuse, match="before a run with the context's shape"):
        context.execute_async_v3(1)
    fake.cudaStreamEndCapture(streams[0])
    context.execute_async_v3(1)
    with pytest.raises(Misuse, match="a run does not wait for a run"):
        context.execute_async_v3(2)
    fake.cudaStreamBeginCapture(streams[0], 1)
    context.execute_async_v3(1)
    _, graph = fake.cudaGraphInstantiate(fake.cudaStreamEndCapture(streams[0])[1], 0)
    fake.cudaGraphLaunch(graph, streams[0])
    context.set_input_shape("images", (8, 4, 4, 3))
    with pytest.raises(Misuse, match="context has been used for something else"):
        fake.cudaGraphLaunch(graph, streams[0])
