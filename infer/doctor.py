"""`python -m infer doctor`: which engines run on this machine, and why the others do not."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from infer.formats import engine_packages, engines_by_title
from isic.runtime.config import Settings
from isic.runtime.files import versions


class DoctorSettings(Settings):
    """Try every engine on this machine; print which ones work, and why the others do not."""


OTHER_PACKAGES = ("lightgbm", "polars")
"""Packages whose versions are printed in addition to those of the engines."""

TRIAL = """
import sys
from infer.engines import unavailable_reason
reason = unavailable_reason(*sys.argv[1:])
print("works" if reason is None else "does not work: " + " ".join(reason.split()))
"""
TRIAL_SECONDS = 120
"""A longer trial hangs. Loading CUDA's libraries from a slow disk takes up to a minute."""


def doctor(settings: DoctorSettings) -> None:
    """Try every engine on this machine and print which ones work, and why the others do not."""
    engines = list(engines_by_title())
    with ThreadPoolExecutor() as pool:
        answers = pool.map(lambda engine: try_engine(engine[1], engine[2]), engines)
        for (title, _, _), answer in zip(engines, answers, strict=True):
            print(f"{title:24} {answer}", flush=True)
    for package, version in versions(*engine_packages(), *OTHER_PACKAGES).items():
        print(f"{package:24} {version}")


def try_engine(name: str, device: str, seconds: float = TRIAL_SECONDS) -> str:
    """Return whether an engine works and why not.

    The trial has its own process: a library that does not fit the machine can crash or hang.
    """
    command = [sys.executable, "-c", TRIAL, name, device]
    try:
        ended = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"does not work: no answer within {seconds:g} s"
    if ended.returncode < 0:
        return f"does not work: it crashes with {signal.Signals(-ended.returncode).name}"
    succeeded = ended.returncode == 0
    lines = (ended.stdout if succeeded else ended.stderr).strip().splitlines()
    answer = lines[-1] if lines else f"it ends with exit code {ended.returncode}"
    return answer if succeeded else f"does not work: {answer}"
