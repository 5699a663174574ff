"""Settings of the machine's libraries that training wants and that are off by default."""

import ctypes
import sys

import torch

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


def prepare(device: torch.device) -> None:
    """Chooses the fast way of what a device can do in several."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, where the run is not in half precision anyway
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Makes glibc keep what a step frees for the next one; does nothing where the C library is another.

    By default it gives large blocks back to the system, which clears every page anew when the next step touches it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)
