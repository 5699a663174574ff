"""AOTInductor packages where the compiler fails, and of one image a call."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.untrained import build_artifact, create_untrained
from infer.engines import create
from infer.engines.aoti import architecture, mismatch, needed_features
from isic.runtime.errors import UserError
from tests.support.commands import TINY_YAML

BROKEN = """#!/bin/sh
case "$*" in *--version*) exec c++ "$@";; esac
echo "In file included from model.cpp:3:" >&2
echo "model.cpp:7:10: fatal error: cuda.h: No such file or directory" >&2
exit 1
"""
"""A compiler that works until it is to compile."""
REFUSES = """#!/bin/sh
case "$*" in *--version*) exec c++ "$@";; esac
echo "ptxas /tmp/kernel.ptx, line 30; error   : Feature '.bf16' requires .target sm_80 or higher" >&2
exit 1
"""
"""One that says what CUDA's assembler says of a type that a GPU lacks."""
ADVICE = "AOTInductor needs g++"
CODE = """
import sys
from pathlib import Path
from benchmarks.untrained import build_artifact, create_untrained
from isic.runtime.errors import UserError
try:
    build_artifact(create_untrained(sys.argv[1]), "aoti", "fp32", Path(sys.argv[2]), "cpu")
except UserError as error:
    print(error)
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_YAML)
    return path


@pytest.mark.parametrize(
    ("compiler", "told", "advice"),
    [
        (None, "No working C++ compiler", ADVICE),
        (BROKEN, "(model.cpp:7:10: fatal error: cuda.h: No such file or directory)", ADVICE),
        (REFUSES, "Feature '.bf16' requires .target sm_80 or higher", "choose another --precision"),
    ],
)
def test_a_compiler_that_fails_is_one_sentence(
    compiler: str | None, told: str, advice: str, tiny: Path, tmp_path: Path
) -> None:
    script = tmp_path / "c++"
    if compiler:
        script.write_text(compiler)
        script.chmod(0o755)
    fresh_cache = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")
    }  # or what was compiled before would be taken
    command = [sys.executable, "-c", CODE, str(tiny), str(tmp_path)]
    environment = {**os.environ, "CXX": str(script), **fresh_cache}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (sentence,) = ended.stdout.splitlines()
    assert told in sentence and sentence.endswith("leave out --formats aoti")
    assert advice in sentence and (ADVICE in sentence) == (advice == ADVICE)


def test_a_package_for_one_image_a_call_takes_more_in_pieces(tiny: Path, tmp_path: Path) -> None:
    artifact = build_artifact(
        create_untrained(str(tiny)), "aoti", "fp32", tmp_path, "cpu", max_batch=1
    )
    engine = create(artifact.path, artifact.manifest)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    features = np.concatenate([engine.run(images[row : row + 1])[0] for row in range(3)])
    np.testing.assert_allclose(engine.run(images)[0], features, atol=1e-5)


def test_float32_is_no_tf32_once_an_engine_is_open(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    artifact = build_artifact(
        create_untrained(str(tiny)), "aoti", "fp32", tmp_path, "cpu", max_batch=2
    )
    torch.backends.cudnn.allow_tf32 = True
    create(artifact.path, artifact.manifest)
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


def test_a_package_runs_on_a_cpu_with_all_its_instructions(tiny: Path, tmp_path: Path) -> None:
    """One with more instructions will do; one with fewer would end the process with SIGILL."""
    artifact = build_artifact(
        create_untrained(str(tiny)), "aoti", "fp32", tmp_path, "cpu", max_batch=2
    )
    assert artifact.manifest["cpu_features"] == needed_features()
    level = torch.backends.cpu.get_cpu_capability().lower()
    assert artifact.manifest["architecture"] == architecture("cpu") and level in artifact.path.name
    older = {**artifact.manifest, "cpu_features": needed_features()[:-1]}
    assert mismatch(artifact.manifest, "cpu") is None and mismatch(older, "cpu") is None
    newer = {**artifact.manifest, "cpu_features": [*needed_features(), "avx1024", "amx_fp4"]}
    with pytest.raises(
        UserError,
        match=r"a CPU with amx_fp4, avx1024, which this one lacks.*aoti --device cpu --force",
    ):
        create(artifact.path, newer)
    former = {**artifact.manifest, "architecture": f"cpu-{platform.machine()}"}
    del former["cpu_features"]
    with pytest.raises(UserError, match=r"does not record for which CPU's instructions .* --force"):
        create(artifact.path, former)
