"""The device and the artifacts of a network: tried in a process of its own, which may crash."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infer.doctor import TrialError, attempt
from infer.formats import AUTO_ORDER, Precision
from infer.submission.contents import PackedNetwork
from isic.layout import fold_dirs
from isic.runtime.errors import UserError
from isic.runtime.machine import gpus, no_gpu_reason

FIRST_ON_CPU: tuple[str, Precision] = ("onnx", "int8")
"""The fastest kind on a CPU. AUTO_ORDER has it last, as it changes scores visibly; here it was
packed on request."""

TRIAL_SECONDS = 600
"""A longer trial hangs. The first one reads packages of a GB and CUDA from a slow network disk."""


@dataclass(frozen=True)
class Engine:
    """How a network runs on this machine."""

    format: str
    precision: str
    device: str
    num_processes: int
    """One per GPU."""

    def __str__(self) -> str:
        number = f" x {self.num_processes}" if self.num_processes > 1 else ""
        device = "GPU" if self.device == "cuda" else "CPU"
        return f"{self.format} {self.precision} on the {device}{number}"


def choose_engine(network: PackedNetwork, run: Path, device: str) -> tuple[Engine, list[str]]:
    """Return the first kind of artifact that really runs a batch here, GPUs before the CPU.

    Args:
        run: the folder of the network's folds.
        device: `cpu`, `cuda` or `auto`.

    Returns:
        The engine, and the reasons why GPUs are not used.

    Raises:
        UserError: none runs.
    """
    problems: list[str] = []
    no_gpu = no_gpu_reason() if device == "auto" else None
    if no_gpu:
        problems.append(no_gpu)
        device = "cpu"
    for engine in _engines(network, device):
        reason = _problem(network, run, engine)
        if reason is None:
            return engine, problems
        problems.append(f"{engine}: {reason}")
    kinds = ", ".join(" ".join(kind) for kind in network.kinds)
    reasons = "; ".join(problems) or f"it has only {kinds}"
    raise UserError(f"{network.name} does not run on this machine ({reasons})")


def _engines(network: PackedNetwork, device: str) -> Iterator[Engine]:
    if device in {"auto", "cuda"}:
        # A machine without a GPU has no name of one; if one is asked for, the trial says why.
        number = max(1, len(gpus()))
        for kind in AUTO_ORDER["cuda"]:
            if kind in network.kinds:
                yield Engine(*kind, "cuda", number)
    if device in {"auto", "cpu"}:
        order = (FIRST_ON_CPU, *(kind for kind in AUTO_ORDER["cpu"] if kind != FIRST_ON_CPU))
        for kind in order:
            if kind in network.kinds:
                yield Engine(*kind, "cpu", 1)


def _problem(network: PackedNetwork, run: Path, engine: Engine) -> str | None:
    """Return why a network's first fold does not run a batch, None if it does."""
    folder = next(iter(fold_dirs(run, network.fold).values()))
    try:
        reason: str | None = attempt(
            "try_artifact",
            str(folder),
            engine.format,
            engine.precision,
            engine.device,
            seconds=TRIAL_SECONDS,
        )["reason"]
    except TrialError as error:
        return str(error)
    return reason
