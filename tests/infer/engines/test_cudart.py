"""Calls of the CUDA runtime."""

from types import SimpleNamespace

import pytest

from infer.engines import cudart
from infer.engines.cudart import CudaError
from isic.runtime.errors import UserError
from tests.support.fake_cuda import FakeCuda


def test_a_call_that_breaks_a_recording_leaves_the_stream_usable(cuda: FakeCuda) -> None:
    stream = cudart.Stream()
    with pytest.raises(CudaError, match="cudaMalloc failed: error 900"):
        stream.recorded(lambda: cudart.DeviceMemory(8) and None)
    with pytest.raises(CudaError, match="cudaStreamEndCapture failed: error 901"):
        stream.recorded(lambda: cuda.cudaMalloc(8) and None)
    stream.wait()


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        (
            12040,
            'the NVIDIA driver is for CUDA 12.4, .*CUDA runtime 13.5; .*"cuda-bindings<13".* tensorrt-cu12',
        ),
        (13000, r"CUDA finds no GPU \(driver version is insufficient\); restart"),
        (0, r"CUDA finds no GPU \(driver version is insufficient\); restart"),
    ],
)
def test_a_driver_that_is_too_old_is_named(
    driver: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The versions are made up: CUDA returns the same status for an old driver and for none."""
    fake = SimpleNamespace(
        cudaGetDeviceCount=lambda: (35, None),
        cudaDriverGetVersion=lambda: (0, driver),
        cudaRuntimeGetVersion=lambda: (0, 13050),
        cudaGetErrorString=lambda status: (0, b"driver version is insufficient"),
    )
    monkeypatch.setattr(cudart, "runtime", lambda: fake)
    monkeypatch.setattr(cudart, "no_gpu_reason", lambda: None)
    with pytest.raises(UserError, match=words) as raised:
        cudart.architecture()
    assert "\n" not in str(raised.value)
    assert ("finds no GPU" in str(raised.value)) == (driver != 12040)
