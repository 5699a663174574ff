"""What training makes of a machine: its device, its cores, and settings of its libraries that are off by default."""

import ctypes
import shutil
import sys
from pathlib import Path

import torch

from isic.runtime.errors import UserError, warn
from isic.runtime.machine import num_cores
from train import distributed

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""
BFLOAT16_CAPABILITY = (8, 0)
"""Compute capability of the first GPUs that compute in bfloat16."""
SHARED_MEMORY = Path("/dev/shm")
PREFETCHED = 2
"""Batches that each worker prepares in advance, as torch does by default."""
TENSOR_OVERHEAD = 32 * 1024
"""Bytes by which the files of a batch's tensors are larger than the pixels."""


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


def without_bfloat16(device: torch.device) -> str | None:
    """Return why a device does not compute in bfloat16, None if it does.

    On older GPUs torch imitates it, slowly, and compilers refuse it.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return (
        "bfloat16 takes a GPU of compute capability 8.0 (Ampere) or newer, and "
        f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
    )


def check_bfloat16(device: torch.device) -> None:
    """Raise UserError if a device that is to compute in bfloat16 does not do so."""
    if reason := without_bfloat16(device):
        raise UserError(f"--bf16: {reason}; use --fp16")


def default_workers(device: torch.device) -> int:
    """Returns how many processes should decode and augment for one that trains: a GPU wants all the cores there are.

    Without a GPU it is none: the network's threads share each layer evenly, so that whoever takes a core from one of
    them makes all of them wait, and handing batches over comes on top.
    """
    if device.type == "cpu":
        return 0
    return max(1, num_cores() // distributed.local_world_size())


def fit_workers(num_workers: int, batch_bytes: int, num_held: int) -> tuple[int, int]:
    """Returns how many workers, and prefetched batches of each, have room in shared memory.

    Workers hand batches over in /dev/shm, which has 64 MB in a container by default. With less than is wanted there is
    one batch per worker, and a warning is printed; without room for any batch the number of workers is 0.

    Args:
        num_workers: wanted, of each of the processes that train on this machine.
        batch_bytes: of the tensors of a batch.
        num_held: batches that the main process holds besides.
    """
    if not num_workers or not SHARED_MEMORY.is_dir():
        return num_workers, PREFETCHED
    free = shutil.disk_usage(SHARED_MEMORY).free // distributed.local_world_size()
    num_batches = max(free // (batch_bytes + TENSOR_OVERHEAD) - num_held, 0)
    if num_workers * PREFETCHED <= num_batches:
        return num_workers, PREFETCHED
    fitting = min(num_workers, num_batches)
    if distributed.is_main():
        warn(
            f"the {free / 1e6:.0f} MB of {SHARED_MEMORY} have room for few batches of {num_workers} workers; "
            f"{fitting} are used, with one batch each; `docker run --shm-size` makes room, --num_workers sets "
            "their number",
        )
    return fitting, 1


def prepare(device: torch.device) -> None:
    """Makes a device the one that work goes to, and chooses the fast way of what it can do in several."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current one
        allow_tf32(device)
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
    if device.type == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), num_cores()))
        keep_freed_memory()


def allow_tf32(device: torch.device) -> None:
    """Let a GPU multiply float32 as TF32, with 10 bits, if the run is not in half precision."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def keep_freed_memory() -> None:
    """Makes glibc keep what a step frees for the next one; does nothing where the C library is another.

    By default it gives large blocks back to the system, which clears every page anew when the next step touches it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)
