"""TensorRT 10 and 11 and TensorRT-RTX, through one code path."""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from isic.errors import UserError


@dataclass(frozen=True)
class Flavour:
    """One of NVIDIA's two libraries with the same interface."""

    title: str
    extra: str
    """The extra of this package that installs it; the Python module has the same name."""
    portable: bool
    """Its plans are built without a GPU for several architectures, and their kernels compiled where they run."""


FLAVOURS = {
    "tensorrt": Flavour("TensorRT", extra="tensorrt", portable=False),
    "tensorrt_rtx": Flavour("TensorRT-RTX", extra="tensorrt_rtx", portable=True),
}

AMPERE_PLUS = "sm80plus"
"""The architectures of a plan that runs on Ampere GPUs and all newer ones."""


@cache
def import_runtime(flavour: str) -> ModuleType:
    """Returns the Python module of a flavour. Raises UserError where it is not installed."""
    entry = FLAVOURS[flavour]
    try:
        return import_module(entry.extra)
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{entry.title} does not load here ({reason}); install it with `pip install isic-toolkit[{entry.extra}]`"
        ) from None


@cache
def logger(trt: ModuleType) -> Any:
    """Returns the logger of a flavour, which keeps what went wrong in `errors`.

    There is one a process, because TensorRT goes on with the first that it is given.
    """

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in {trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR}:
                self.errors.append(" ".join(message.split()))

        def reason(self) -> str:
            """Returns the first thing that went wrong since the last call."""
            errors, self.errors = self.errors, []
            return errors[0][:300] if errors else "it gives no reason"

    return Log()
