"""Fixtures: a broken GPU, and a fake CUDA."""

import gc
from collections.abc import Iterator

import pytest

from infer import engines
from infer.engines import cudart, onnxruntime
from infer.engines.onnxruntime import (
    unavailable_reason,
)
from tests.support.fake_cuda import FakeCuda


@pytest.fixture
def broken_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, on which CUDA's libraries are missing."""
    if engines.unavailable_reason("onnx", "cuda") is None:
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(onnxruntime, "no_gpu_reason", lambda: None)
    monkeypatch.setattr(engines, "has_gpu", lambda: True)
    for cached in (engines.usual_device, unavailable_reason):
        cached.cache_clear()


@pytest.fixture(params=[False, True], ids=["late", "eager copies"])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A fake CUDA in its two extreme orders of work."""
    fake = FakeCuda(eager_copies=request.param)
    monkeypatch.setattr(cudart, "runtime", lambda: fake)
    yield fake
    gc.collect()
    assert not fake.misuses
