"""AOTInductor packages, on the CPU or GPU they were compiled for. The only engine with torch."""

import contextlib
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._inductor.package.package import load_package

from infer.engines import IN_FLIGHT, Engine, Outputs, Pending, network_command
from infer.engines.contract import FEATURES, LOGITS, RESULTS, output_names
from isic.layout import Fold
from isic.preprocess import Pixels
from isic.runtime.errors import UserError, first_line
from isic.runtime.machine import (
    cpu_features,
    driver_cuda,
    driver_for,
    no_gpu_reason,
    num_cores,
    old_driver_reason,
)
from isic.views import VIEWS

CPU_PIECE = 8
"""Views of images per call on a CPU: few enough that its caches hold the activations."""
NUM_STREAMS = 2
"""CUDA streams, so that one batch is copied while another one is computed."""

LESS_MEMORY = "use a smaller --batch_size, or end other processes on the GPU"
FAILURES = {
    "out of memory": ("the GPU's memory is full", LESS_MEMORY),
    # Up to torch 2.11 a package hides the reason (deepmodeling/deepmd-kit#5418).
    "run_func_": ("the GPU failed, as a rule because its memory is full", LESS_MEMORY),
    "": (
        "the GPU failed",
        "run `python -m infer doctor`, and export the package again if the GPU works",
    ),
}
"""Cause and fix of an error of the GPU, by a part of its message; the first match counts."""

Forward = Callable[[Tensor], Sequence[Tensor]]
"""A network on a device: images uint8 [N, H, W, 3] to outputs in the order of the contract."""


class TorchEngine(Engine):
    """Networks that torch runs: by one thread on a CPU, on two streams on a GPU."""

    def __init__(
        self,
        forwards: Mapping[Fold, Forward],
        max_batch: int,
        device: str,
        outputs: Sequence[str] = (FEATURES, LOGITS),
    ) -> None:
        """Prepare the engine.

        Args:
            forwards: the network by fold, on the device.
            max_batch: images per call of a network; a larger batch runs in pieces.
            device: `cpu` or `cuda`.
            outputs: the names of each network's outputs in their order.
        """
        self.device = device
        self.folds = tuple(forwards)
        self._forwards = forwards
        self._outputs = tuple(outputs)
        self._num_results = sum(name in RESULTS for name in outputs)
        self._max_batch = max_batch
        if device == "cpu":
            # torch computes with threads of its own.
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="torch")
        else:
            with device_errors_as_user_errors():
                # The weights were copied on the default stream, which the others do not wait for.
                torch.cuda.synchronize()
            self._streams = cycle([torch.cuda.Stream() for _ in range(NUM_STREAMS)])  # type: ignore[no-untyped-call]
            self._in_flight: deque[OnGpu] = deque()

    def submit(self, images: Pixels, folds: Iterable[Fold] | None = None) -> Pending:
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        chosen = self.folds if folds is None else tuple(folds)
        if self.device == "cpu":
            return self._pool.submit(self._run_on_cpu, pixels, chosen)
        while len(self._in_flight) >= IN_FLIGHT:
            self._in_flight.popleft().wait()
        pending = self._start_on_gpu(pixels, chosen)
        self._in_flight.append(pending)
        return pending

    def run_other(self, images: Pixels, name: str) -> NDArray[np.float32]:
        """Return an output of the only network that no batch's result has."""
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        (outputs,) = self._forward(pixels, self.folds).values()
        values: NDArray[np.float32] = outputs[self._outputs.index(name)].cpu().numpy()
        return values

    def close(self) -> None:
        if self.device == "cpu":
            self._pool.shutdown()
        else:
            with contextlib.suppress(RuntimeError):  # the GPU has failed, which results report
                torch.cuda.synchronize()

    def _run_on_cpu(self, pixels: Tensor, folds: Sequence[Fold]) -> dict[Fold, Outputs]:
        return as_arrays(self._results(pixels, folds))

    def _start_on_gpu(self, pixels: Tensor, folds: Sequence[Fold]) -> "OnGpu":
        """Enqueue copies and kernels of a batch on the next stream."""
        with torch.cuda.stream(next(self._streams)), device_errors_as_user_errors():
            outputs = {
                # A copy to the host that does not block goes to page-locked memory.
                fold: [output.to("cpu", non_blocking=True) for output in parts]
                for fold, parts in self._results(pixels, folds).items()
            }
            # A thread that waits for a blocking event sleeps; otherwise it would take a core.
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
        return OnGpu(outputs, done)

    def _results(self, pixels: Tensor, folds: Iterable[Fold]) -> dict[Fold, list[Tensor]]:
        """Return the outputs of each fold that a batch's result has, on the device."""
        outputs = self._forward(pixels, folds)
        return {fold: parts[: self._num_results] for fold, parts in outputs.items()}

    @torch.inference_mode()
    def _forward(self, pixels: Tensor, folds: Iterable[Fold]) -> dict[Fold, list[Tensor]]:
        """Return each fold's outputs on the device, run in pieces of at most `max_batch`."""
        pieces = [
            piece.to(self.device, non_blocking=True)
            for piece in torch.split(pixels, self._max_batch)
        ]
        return {fold: _joined([self._forwards[fold](piece) for piece in pieces]) for fold in folds}


def _joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return each output of several pieces as one tensor."""
    if len(parts) == 1:
        return list(parts[0])
    return [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


class OnGpu:
    """A batch on the GPU: its outputs in host memory are valid after the event."""

    def __init__(self, outputs: Mapping[Fold, Sequence[Tensor]], done: torch.cuda.Event) -> None:
        self._outputs = outputs
        self._done = done

    def wait(self) -> None:
        """Wait until the outputs are in host memory. Raise UserError if the GPU failed."""
        with device_errors_as_user_errors():
            self._done.synchronize()

    def result(self) -> dict[Fold, Outputs]:
        self.wait()
        return as_arrays(self._outputs)


def as_arrays(outputs: Mapping[Fold, Sequence[Tensor]]) -> dict[Fold, Outputs]:
    """Return the outputs of tensors on the host, without a copy."""
    arrays = {fold: [part.numpy() for part in parts] for fold, parts in outputs.items()}
    return {fold: (features, *others) for fold, (features, *others) in arrays.items()}


@contextlib.contextmanager
def device_errors_as_user_errors() -> Iterator[None]:
    """Turn an error of the GPU, such as full memory, into a UserError."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        text = str(error)
        cause, fix = next(found for part, found in FAILURES.items() if part in text)
        raise UserError(f"{cause} ({first_line(error)}); {fix}") from None


def refuse_mismatch(path: Path, manifest: Mapping[str, Any], device: str) -> None:
    """Raise UserError if a package was compiled for another device or architecture."""
    reason = mismatch(manifest, device)
    if reason:
        tta = manifest.get("tta", "none")
        views = "" if tta == "none" else f"--tta {tta} "
        raise UserError(
            f"{path} {reason}; run `{network_command(manifest)} {views}"
            f"--formats aoti --device {device} --force` on this machine"
        )


def open_package(path: Path) -> Forward:
    """Load a package. Raise UserError if it is not a whole one."""
    try:
        # A runner is busy until the GPU has finished its batch; with a single one the next call
        # would wait for that.
        package: Forward = load_package(str(path), num_runners=IN_FLIGHT)
    except RuntimeError as error:
        raise UserError(
            f"{path} is not a whole AOTInductor package ({first_line(error)}); export it again"
        ) from None
    return package


def forbid_tf32() -> None:
    """Turn TF32 off in this process, which rounds float32 to 10 bits of mantissa on a GPU.

    It would fail float32's parity check, and the float32 layers of a low-precision network are
    there to be exact.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def package_architecture(device: str) -> str:
    """Return the architecture that a package is compiled for: `cpu-x86_64-avx512`, `cuda-sm90`.

    Raises:
        UserError: the device is a GPU, and there is none.
    """
    if device == "cpu":
        return f"cpu-{platform.machine()}-{instruction_set()}"
    reason = unavailable_reason("aoti", device)
    if reason:
        raise UserError(f"--device {device}: {reason}")
    major, minor = torch.cuda.get_device_capability()
    return f"cuda-sm{major}{minor}"


def instruction_set() -> str:
    """Return the vector instructions that torch's compiler uses here: `avx2`, `avx512`."""
    return torch.backends.cpu.get_cpu_capability().lower().replace(" ", "")


def needed_features() -> list[str]:
    """Return the instructions that a package compiled here needs: with -march=native, all."""
    return cpu_features() or [instruction_set()]


def mismatch(manifest: Mapping[str, Any], device: str) -> str | None:
    """Return why a package cannot run on a device here, None if it can.

    A CPU that lacks an instruction would end the process with SIGILL
    (https://github.com/pytorch/pytorch/issues/121516); one with more instructions runs it.
    """
    built_by = manifest.get("versions", {}).get("torch", torch.__version__)
    if _minor(built_by) != _minor(torch.__version__):
        # A package calls functions inside torch, which change without notice.
        return f"was compiled by torch {built_by}, this is {torch.__version__}"
    built_for = manifest["architecture"]
    here = package_architecture(device)
    if device != "cpu" or not built_for.startswith(f"cpu-{platform.machine()}"):
        return None if built_for == here else f"was compiled for {built_for}, this is {here}"
    if "cpu_features" not in manifest:
        return "does not record for which CPU's instructions it was compiled"
    missing = sorted(set(manifest["cpu_features"]) - set(needed_features()))
    if not missing:
        return None
    return f"was compiled for a CPU with {', '.join(missing)}, which this one lacks"


def _minor(version: str) -> list[str]:
    """Return major and minor of a version."""
    return version.split(".")[:2]


@cache
def unavailable_reason(name: str, device: str) -> str | None:
    """Return why torch cannot compute on a device here, None if it has just done so."""
    try:
        torch.ones(1, device=device).sum().item()
    except (AssertionError, RuntimeError) as error:  # built without CUDA; no GPU, or one that fails
        if device == "cpu":
            return f"{first_line(error)}; run `pip install --force-reinstall torch`"
        return no_gpu_reason() or _cuda_reason(error)
    return None


def _cuda_reason(error: Exception) -> str:
    """Return why torch cannot use a GPU that the driver can use, from the error that it gave."""
    library = f"torch {torch.__version__}"
    fix = f"install a torch for CUDA {driver_cuda()} or older from https://pytorch.org"
    too_old = old_driver_reason(library, built_for())
    if too_old:
        return f"{too_old}; {fix}, or {driver_for(built_for())}"
    if built_for() is None:
        return f"{library} was built without CUDA; {fix}"
    return f"{library}: {first_line(error)}; {fix}"


def built_for() -> str | None:
    """Return the CUDA that torch was built for (`13.0`), None if for none."""
    return torch.version.cuda


def create(
    artifacts: Mapping[Fold, Path], manifests: Mapping[Fold, Mapping[str, Any]], device: str
) -> TorchEngine:
    """Load packages onto `cpu` or `cuda`; they contain code, so their source must be trusted.

    Raises:
        UserError: one was compiled for another device or architecture, or is not a package.
    """
    for fold, path in artifacts.items():
        refuse_mismatch(path, manifests[fold], device)
    forbid_tf32()
    max_batch = min(int(manifest["max_batch"]) for manifest in manifests.values())
    first, *_ = manifests.values()
    if device == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), num_cores()))
        num_views = len(VIEWS[first.get("tta", "none")])
        max_batch = min(max_batch, max(1, CPU_PIECE // num_views))
    forwards = {fold: open_package(path) for fold, path in artifacts.items()}
    return TorchEngine(forwards, max_batch, device, output_names(first))
