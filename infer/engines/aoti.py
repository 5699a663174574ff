"""AOTInductor packages, on the CPU or GPU they were compiled for. The only engine with torch."""

import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._inductor import aoti_load_package

from infer.engines import Outputs
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

CPU_PIECE = 8
"""Images per call on a CPU: few enough that its caches hold the activations."""


class AotiEngine:
    """A compiled package. One thread at a time may use it."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], device: str) -> None:
        """Load the package onto the device.

        Args:
            path: the `.pt2` package; it contains compiled code, so its source must be trusted.
            manifest: has the architecture and the largest batch that it was compiled for.
            device: `cpu` or `cuda`.

        Raises:
            UserError: it was compiled for another device or architecture, or is not a package.
        """
        self.device = device
        reason = mismatch(manifest, device)
        if reason:
            raise UserError(
                f"{path} {reason}; run `python -m export --config {manifest['name']} "
                f"--formats aoti --device {device} --force` on this machine"
            )
        forbid_tf32()
        if device == "cpu":
            torch.set_num_threads(min(torch.get_num_threads(), num_cores()))
        try:
            self._forward = aoti_load_package(str(path))
        except RuntimeError as error:
            raise UserError(
                f"{path} is not a whole AOTInductor package ({first_line(error)}); export it again"
            ) from None
        max_batch = int(manifest["max_batch"])
        self._piece = min(max_batch, CPU_PIECE) if device == "cpu" else max_batch

    def run(self, images: Pixels) -> Outputs:
        features, logits, *_ = self._outputs(images)
        return features, logits

    def predict_mask(self, images: Pixels) -> NDArray[np.float32]:
        """Return probabilities [N, h, w] of a network with the optional output `mask`."""
        return self._outputs(images)[2]

    def allocate(self, shape: tuple[int, int, int, int]) -> Pixels:
        """Return an uninitialised uint8 array, in page-locked memory if the device is a GPU."""
        tensor = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device == "cuda")
        array: Pixels = tensor.numpy()
        return array

    @torch.inference_mode()
    def _outputs(self, images: Pixels) -> list[NDArray[np.float32]]:
        """Run a batch in pieces of at most `self._piece` images."""
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        parts = torch.split(pixels, self._piece)
        pieces = [self._forward(part.to(self.device, non_blocking=True)) for part in parts]
        return [torch.cat(outputs).cpu().numpy() for outputs in zip(*pieces, strict=True)]


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


def create(path: Path, manifest: Mapping[str, Any], device: str) -> AotiEngine:
    """Load a package onto `cpu` or `cuda`."""
    return AotiEngine(path, manifest, device)
