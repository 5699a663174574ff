"""What training makes of a machine: its device, its cores, and settings of its libraries that are off by default."""

import ctypes
import sys

import torch

from isic.errors import UserError
from isic.machine import cores
from train import distributed

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


def select_device(name: str) -> torch.device:
    """Returns the device of a setting: `auto` is the GPU where there is one, of several this process's own."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: this machine has no GPU that torch can use; use --device cpu"
        )
    if name in {"auto", "cuda"}:
        return (
            torch.device("cuda", distributed.local_rank())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f'--device "{name}" is no device; use auto, cpu, cuda or cuda:N') from None


def default_workers(device: torch.device) -> int:
    """Returns how many processes should decode and augment for one that trains: a GPU wants all the cores there are.

    Without a GPU it is none: the network's threads share each layer evenly, so that whoever takes a core from one of
    them makes all of them wait, and handing batches over comes on top.
    """
    if device.type == "cpu":
        return 0
    return max(1, len(cores()) // distributed.local_world_size())


def prepare(device: torch.device) -> None:
    """Makes a device the one that work goes to, and chooses the fast way of what it can do in several."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current one
        torch.set_float32_matmul_precision(
            "high"
        )  # TF32, where the run is not in half precision anyway
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
