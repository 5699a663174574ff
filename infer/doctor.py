"""`python -m infer doctor`: which engines run on this machine, and why the others do not."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from isic.runtime.config import Settings
from isic.runtime.files import versions


class DoctorSettings(Settings):
    """What `python -m infer doctor` takes: nothing."""


ENGINES = {
    "ONNX Runtime, CPU": ("onnx", "cpu"),
    "ONNX Runtime, CUDA": ("onnx", "cuda"),
    "AOTInductor, CPU": ("aoti", "cpu"),
    "AOTInductor, CUDA": ("aoti", "cuda"),
    "TensorRT": ("tensorrt", "cuda"),
    "TensorRT-RTX": ("tensorrt_rtx", "cuda"),
}
"""Each engine's format and device."""

PACKAGES = (
    "onnxruntime-gpu",
    "onnxruntime",
    "torch",
    "tensorrt",
    "tensorrt_rtx",
    "cuda-bindings",
    "lightgbm",
    "polars",
)

TRIAL = """
import sys
from infer.engines import unavailable_reason
reason = unavailable_reason(*sys.argv[1:])
print("works" if reason is None else "does not work: " + " ".join(reason.split()))
"""
SECONDS = 120
"""A trial that takes longer hangs. Loading CUDA's libraries from a slow disk takes up to a minute."""


def doctor(settings: DoctorSettings) -> None:
    """Try every engine on this machine and print which ones work, and why the others do not."""
    with ThreadPoolExecutor() as pool:
        answers = pool.map(lambda engine: try_out(*engine), ENGINES.values())
        for title, answer in zip(ENGINES, answers, strict=True):
            print(f"{title:24} {answer}", flush=True)
    for package, version in versions(*PACKAGES).items():
        print(f"{package:24} {version}")


def try_out(name: str, device: str, seconds: float = SECONDS) -> str:
    """Return whether an engine works and why not; it is tried in a process that may crash or hang."""
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
    lines = (ended.stdout if ended.returncode == 0 else ended.stderr).strip().splitlines()
    answer = lines[-1] if lines else f"it ends with exit code {ended.returncode}"
    return answer if ended.returncode == 0 else f"does not work: {answer}"
