"""The AOTInductor engine."""

import contextlib
import platform
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.untrained import create_untrained, export_untrained
from infer.engines import IN_FLIGHT, aoti, create
from infer.engines.aoti import TorchEngine, mismatch, needed_features, package_architecture
from isic.runtime import machine
from isic.runtime.errors import UserError


@pytest.mark.slow
def test_a_package_for_one_image_a_call_takes_more_in_pieces(tiny: Path, tmp_path: Path) -> None:
    artifact = export_untrained(
        create_untrained(str(tiny)), "aoti", "fp32", tmp_path, "cpu", max_batch=1
    )
    engine = create(artifact.path, artifact.manifest)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    features = np.concatenate([engine.run(images[row : row + 1])[0] for row in range(3)])
    np.testing.assert_allclose(engine.run(images)[0], features, atol=1e-5)


class FakeEvent:
    """A CUDA event of work that is done at once; counts the waits."""

    waits = 0

    def __init__(self, blocking: bool) -> None:
        assert blocking, "a thread that waits must not take a core from the decoders"
        self.is_recorded = False

    def record(self) -> None:
        self.is_recorded = True

    def synchronize(self) -> None:
        assert self.is_recorded
        FakeEvent.waits += 1


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> TorchEngine:
    """The engine's way through a GPU, with torch's CUDA replaced by the CPU."""
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    synchronized: list[bool] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synchronized.append(True))
    monkeypatch.setattr(FakeEvent, "waits", 0)
    monkeypatch.setattr(Tensor, "to", to_cpu)

    def forward(factor: int, images: Tensor) -> tuple[Tensor, Tensor]:
        assert len(images) <= 4
        features = factor * images.flatten(1)[:, :3].float()
        return features.half(), features.sum(dim=1, keepdim=True)

    opened = TorchEngine({fold: partial(forward, fold) for fold in (1, 2)}, 4, "cuda")
    assert synchronized, "other streams might read the weights before they are there"
    return opened


@pytest.mark.usefixtures("engine")
def test_auxiliary_logits_leave_a_gpu_too() -> None:
    def forward(images: Tensor) -> tuple[Tensor, ...]:
        values = images.flatten(1).float()
        return values[:, :3], values[:, :1], values[:, 4:6], values[:, :4].reshape(-1, 2, 2)

    opened = TorchEngine({0: forward}, 4, "cuda", ("features", "logits", "aux", "mask"))
    images = np.arange(9 * 12, dtype=np.uint8).reshape(9, 2, 2, 3)
    features, logits, aux = opened.run(images)
    flat = images.reshape(9, 12)
    np.testing.assert_array_equal(features, flat[:, :3])
    np.testing.assert_array_equal(logits, flat[:, :1])
    np.testing.assert_array_equal(aux, flat[:, 4:6])


def to_cpu(tensor: Tensor, device: str, non_blocking: bool) -> Tensor:
    """Replace `Tensor.to`, which must not block."""
    assert non_blocking
    return tensor


def test_batches_on_a_gpu_are_waited_for_when_their_results_are(engine: TorchEngine) -> None:
    batches = [np.full((number, 2, 2, 3), number, np.uint8) for number in (4, 9, 1, 5, 4)]
    pendings = [engine.submit(images) for images in batches]
    assert FakeEvent.waits == len(batches) - IN_FLIGHT
    for images, pending in zip(batches, pendings, strict=True):
        for fold, (features, logits) in pending.result().items():
            assert features.dtype == np.float16
            np.testing.assert_array_equal(features, np.full((len(images), 3), fold * len(images)))
            np.testing.assert_array_equal(logits, 3 * features[:, :1])
    assert list(engine.submit(batches[0], [2]).result()) == [2]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory\nTry"),
            "memory is full .*smaller --batch_size",
        ),
        (
            RuntimeError("run_func_( container_handle_) API call failed at x.cpp, line 144"),
            "failed, as a rule because its memory is full .*smaller --batch_size",
        ),
        (
            RuntimeError("an illegal memory access\nCompile"),
            "failed .an illegal memory access.; run",
        ),
    ],
)
def test_an_error_on_a_gpu_is_one_sentence(
    error: Exception, sentence: str, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    pending = engine.submit(np.zeros((1, 2, 2, 3), np.uint8))
    monkeypatch.setattr(FakeEvent, "synchronize", fail)
    with pytest.raises(UserError, match=sentence):
        pending.result()
    monkeypatch.setattr(engine, "_forwards", {1: fail})
    with pytest.raises(UserError, match=sentence):
        engine.submit(np.zeros((1, 2, 2, 3), np.uint8), [1])
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    engine.close()  # it must not replace the error that is on its way


@pytest.mark.slow
def test_float32_is_no_tf32_once_an_engine_is_open(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    artifact = export_untrained(
        create_untrained(str(tiny)), "aoti", "fp32", tmp_path, "cpu", max_batch=2
    )
    torch.backends.cudnn.allow_tf32 = True
    create(artifact.path, artifact.manifest)
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.slow
def test_a_package_runs_on_a_cpu_with_all_its_instructions(tiny: Path, tmp_path: Path) -> None:
    """One with more instructions will do; one with fewer would end the process with SIGILL."""
    artifact = export_untrained(
        create_untrained(str(tiny)), "aoti", "fp32", tmp_path, "cpu", max_batch=2
    )
    assert artifact.manifest["cpu_features"] == needed_features()
    level = torch.backends.cpu.get_cpu_capability().lower()
    assert artifact.manifest["architecture"] == package_architecture("cpu")
    assert level in artifact.path.name
    older = {**artifact.manifest, "cpu_features": needed_features()[:-1]}
    assert mismatch(artifact.manifest, "cpu") is None
    assert mismatch(older, "cpu") is None
    newer = {**artifact.manifest, "cpu_features": [*needed_features(), "avx1024", "amx_fp4"]}
    with pytest.raises(
        UserError,
        match=r"a CPU with amx_fp4, avx1024, which this one lacks.*aoti --device cpu --force",
    ):
        create(artifact.path, newer)
    older_version = {**artifact.manifest, "architecture": f"cpu-{platform.machine()}"}
    del older_version["cpu_features"]
    with pytest.raises(UserError, match=r"does not record for which CPU's instructions .* --force"):
        create(artifact.path, older_version)


def test_a_package_of_another_torch_is_refused() -> None:
    manifest = {
        "architecture": package_architecture("cpu"),
        "cpu_features": needed_features(),
        "versions": {"torch": torch.__version__},
    }
    assert mismatch(manifest, "cpu") is None
    manifest["versions"] = {"torch": "1.99.0+cu130"}
    assert str(mismatch(manifest, "cpu")).startswith("was compiled by torch 1.99.0+cu130, this is ")


@pytest.mark.parametrize(
    ("built_for", "driver", "reason"),
    [
        (None, "12.6", "torch .* was built without CUDA; install a torch for CUDA 12.6 or older"),
        ("13.0", "12.6", "built for CUDA 13.0, and the .* CUDA up to 12.6; .* driver 580 or newer"),
        ("12.8", "13.0", "torch .*: no kernel image; install a torch for CUDA 13.0 or older"),
    ],
)
def test_why_torch_cannot_use_a_gpu(
    built_for: str | None, driver: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no kernel image\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch, "ones", fail)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(aoti, "no_gpu_reason", lambda: None)
    monkeypatch.setattr(aoti, "driver_cuda", lambda: driver)
    monkeypatch.setattr(machine, "driver_cuda", lambda: driver)
    found = aoti.unavailable_reason.__wrapped__("aoti", "cuda")
    assert re.search(reason, str(found))
