"""`python -m infer doctor`: which engines run on this machine, and why the others do not."""

from collections.abc import Callable

from infer.engines.onnxruntime import cuda_works
from isic.config import Settings
from isic.files import versions


class DoctorSettings(Settings):
    """What `python -m infer doctor` takes: nothing."""


CHECKS: dict[str, Callable[[], str | None]] = {
    "ONNX Runtime, CPU": lambda: None,
    "ONNX Runtime, CUDA": cuda_works,
}
"""Each engine and what finds out why it does not work here (None: it works)."""


def doctor(settings: DoctorSettings) -> None:
    """Says which engines run on this machine, and what to install for the others."""
    for name, check in CHECKS.items():
        reason = check()
        print(f"{name:22} {'works' if reason is None else 'does not work: ' + reason}")
    for package, version in versions("onnxruntime-gpu", "onnxruntime", "lightgbm", "polars", "torch").items():
        print(f"{package:22} {version}")
