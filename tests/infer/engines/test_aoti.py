"""The AOTInductor engine."""

import platform
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.untrained import create_untrained, export_untrained
from infer.engines import aoti, create
from infer.engines.aoti import mismatch, needed_features, package_architecture
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
