"""AOTInductor packages, on the CPU or the GPU they were compiled for. The one engine that needs torch."""

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
from isic.runtime.errors import UserError
from isic.runtime.machine import cpu_features, no_gpu_reason, num_cores

CPU_PIECE = 8
"""Images that a CPU works on at once: its caches then hold the activations."""


class AotiEngine:
    """A compiled package. One thread at a time may use it."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], device: str) -> None:
        """Loads the package onto the device.

        Args:
            path: the `.pt2` package; it holds compiled code, so it must come from a source you trust.
            manifest: says the device, the architecture and the largest batch it was compiled for.
            device: `cpu` or `cuda`.

        Raises:
            UserError: it was compiled for another device or architecture, or is not a package.
        """
        self.device = device
        if reason := mismatch(manifest, device):
            raise UserError(
                f"{path} {reason}; run `python -m export --config {manifest['name']} --formats aoti "
                f"--device {device} --force` on this machine"
            )
        forbid_tf32()
        if device == "cpu":
            torch.set_num_threads(min(torch.get_num_threads(), num_cores()))
        try:
            self._forward = aoti_load_package(str(path))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{path} is not a whole AOTInductor package ({reason}); export it again"
            ) from None
        most = int(manifest["max_batch"])
        self._piece = min(most, CPU_PIECE) if device == "cpu" else most

    def run(self, images: Pixels) -> Outputs:
        features, logits, *_ = self._outputs(images)
        return features, logits

    def run_mask(self, images: Pixels) -> NDArray[np.float32]:
        """Returns the lesion's probabilities [n, h, w] of a network that draws them."""
        return self._outputs(images)[2]

    def allocate(self, shape: tuple[int, int, int, int]) -> Pixels:
        """Returns an uninitialised uint8 array of this shape, in page-locked memory where the device is a GPU."""
        array: Pixels = torch.empty(
            shape, dtype=torch.uint8, pin_memory=self.device == "cuda"
        ).numpy()
        return array

    @torch.inference_mode()
    def _outputs(self, images: Pixels) -> list[NDArray[np.float32]]:
        """Runs a batch in pieces, the largest that suit the device, one after another."""
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        parts = torch.split(pixels, self._piece)
        pieces = [self._forward(part.to(self.device, non_blocking=True)) for part in parts]
        return [torch.cat(outputs).cpu().numpy() for outputs in zip(*pieces, strict=True)]


def forbid_tf32() -> None:
    """Makes torch compute float32 in this process as such, where a GPU would round it to TF32's 10 bits.

    That fails the parity gate of float32; low precision's few layers in float32 are there to be exact.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def architecture(device: str) -> str:
    """Return what a package is compiled for: `cpu-x86_64-avx512`, `cuda-sm90`.

    Raises:
        UserError: the device is a GPU, and there is none.
    """
    if device == "cpu":
        return f"cpu-{platform.machine()}-{instruction_set()}"
    if reason := unavailable_reason("aoti", device):
        raise UserError(f"--device {device}: {reason}")
    major, minor = torch.cuda.get_device_capability()
    return f"cuda-sm{major}{minor}"


def instruction_set() -> str:
    """Return the vector instructions that torch's compiler writes for this CPU: `avx2`, `avx512`."""
    return torch.backends.cpu.get_cpu_capability().lower().replace(" ", "")


def needed_features() -> list[str]:
    """Return what a CPU needs to run a package compiled here: with -march=native all this one has."""
    return cpu_features() or [instruction_set()]


def mismatch(manifest: Mapping[str, Any], device: str) -> str | None:
    """Return why a package cannot run on a device here, None if it can.

    A CPU that lacks an instruction would end the process with SIGILL
    (https://github.com/pytorch/pytorch/issues/121516); one that has more runs the package.
    """
    built_for, here = manifest["architecture"], architecture(device)
    of_this_kind = device == "cpu" and built_for.startswith(f"cpu-{platform.machine()}")
    if not of_this_kind:
        return None if built_for == here else f"was compiled for {built_for}, this is {here}"
    if "cpu_features" not in manifest:
        return "does not record for which CPU's instructions it was compiled"
    missing = sorted({*manifest["cpu_features"]} - {*needed_features()})
    return (
        f"was compiled for a CPU with {', '.join(missing)}, which this one lacks"
        if missing
        else None
    )


@cache
def unavailable_reason(name: str, device: str) -> str | None:
    """Return why torch cannot compute on a device here, None if it has just done so."""
    try:
        torch.ones(1, device=device).sum().item()
    except (AssertionError, RuntimeError) as error:  # built without CUDA; no GPU, or one that fails
        return (device == "cuda" and no_gpu_reason()) or str(error).splitlines()[0]
    return None


def create(path: Path, manifest: Mapping[str, Any], device: str) -> AotiEngine:
    """Load a package onto `cpu` or `cuda`."""
    return AotiEngine(path, manifest, device)
