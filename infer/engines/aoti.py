"""AOTInductor packages, on the CPU or the GPU they were compiled for. The one engine that needs torch."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._inductor import aoti_load_package

from infer.engines import Outputs
from isic.errors import UserError
from isic.preprocess import Pixels

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
        built_for, here = manifest["architecture"], architecture(device)
        if built_for != here:
            raise UserError(
                f"{path} was compiled for {built_for}, this is {here}; run `python -m export --config "
                f"{manifest['name']} --formats aoti --device {device}` on this machine"
            )
        forbid_tf32()
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
    """Returns what a package is compiled for: `cpu-x86_64`, `cuda-sm90`.

    Raises:
        UserError: the device is a GPU, and there is none.
    """
    if device == "cpu":
        return f"cpu-{platform.machine()}"
    if reason := works("aoti", device):
        raise UserError(f"--device {device}: {reason}")
    major, minor = torch.cuda.get_device_capability()
    return f"cuda-sm{major}{minor}"


def works(name: str, device: str) -> str | None:
    """Returns why packages for a device cannot run here, None where they can."""
    return (
        None
        if device == "cpu" or torch.cuda.is_available()
        else "torch sees no NVIDIA GPU on this machine"
    )


def create(path: Path, manifest: Mapping[str, Any], device: str) -> AotiEngine:
    """Loads a package; `auto` is the device it was compiled for."""
    return AotiEngine(path, manifest, manifest["device"] if device == "auto" else device)
