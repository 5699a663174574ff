"""AOTInductor packages: parity, and compilers that fail."""

import os
import re
import subprocess
import sys
from inspect import currentframe
from pathlib import Path

import numpy as np
import pytest
from torch._inductor.exc import InductorError

from export.aoti import compiler_errors_as_user_errors
from export.formats import TOLERANCES
from export.parity import check_parity
from isic.runtime.errors import UserError
from tests.support.networks import build_engine, network, spec_of

BROKEN = """#!/bin/sh
case "$*" in *--version*) exec c++ "$@";; esac
echo "In file included from model.cpp:3:" >&2
echo "model.cpp:7:10: fatal error: cuda.h: No such file or directory" >&2
exit 1
"""
"""A compiler that reports its version and fails to compile."""


REFUSES = """#!/bin/sh
case "$*" in *--version*) exec c++ "$@";; esac
echo "ptxas /tmp/kernel.ptx, line 30; error   : " \\
  "Feature '.bf16' requires .target sm_80 or higher" >&2
exit 1
"""
"""A compiler with the error of CUDA's assembler about a type that a GPU lacks."""


ADVICE = "AOTInductor needs g++"


CODE = """
import sys
from pathlib import Path
from benchmarks.untrained import export_untrained, create_untrained
from isic.runtime.errors import UserError
try:
    export_untrained(create_untrained(sys.argv[1]), "aoti", "fp32", Path(sys.argv[2]), "cpu")
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "reason", "advice"),
    [
        (None, "No working C++ compiler", ADVICE),
        (BROKEN, "(model.cpp:7:10: fatal error: cuda.h: No such file or directory)", ADVICE),
        (REFUSES, "Feature '.bf16' requires .target sm_80 or higher", "choose another --precision"),
    ],
)
def test_a_compiler_that_fails_is_reported(
    compiler: str | None, reason: str, advice: str, tiny: Path, tmp_path: Path
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
    assert reason in sentence
    assert sentence.endswith("leave out --formats aoti")
    assert advice in sentence
    assert (ADVICE in sentence) == (advice == ADVICE)


def test_a_missing_cuda_toolkit_is_named() -> None:
    """Torch raises this in an environment of pip's packages alone."""
    error = OSError("CUDA_HOME environment variable is not set. Please set it to your CUDA install")
    with (
        pytest.raises(UserError, match=rf"CUDA_HOME .* is not set.*{re.escape(ADVICE)}"),
        compiler_errors_as_user_errors(),
    ):
        raise InductorError(error, currentframe())


@pytest.mark.slow
def test_a_package_passes_the_parity_check(tmp_path: Path) -> None:
    model, reference = network("test_convnext3")
    spec = spec_of("test_convnext3", "aoti", "bf16", max_batch=16, opt_batch=8)
    engine = build_engine(model, spec, tmp_path)
    assert check_parity(reference, engine, TOLERANCES["bf16"], spec.batch_sizes)
    whole, pieces = (
        engine.run(reference.images),
        [engine.run(part) for part in np.split(reference.images, 4)],
    )
    np.testing.assert_allclose(
        whole[1], np.concatenate([logits for _, logits in pieces]), atol=1e-2
    )
