"""The machine's part in training: device, fast settings of the libraries, loader processes."""

import ctypes
import shutil
import sys
from pathlib import Path
from typing import TypeVar

import torch

from isic.runtime.errors import UserError, warn
from isic.runtime.machine import num_cores
from train import distributed
from train.augmentation.levels import DEVICE_LEVELS
from train.config import Precision, TrainSettings

SettingsT = TypeVar("SettingsT", bound=TrainSettings)

TRIM_THRESHOLD = -1
MMAP_MAX = -4
"""Parameters of glibc's mallopt(3)."""
BFLOAT16_CAPABILITY = (8, 0)
"""Compute capability of the first GPUs that compute in bfloat16: Ampere."""
FLOAT16_CAPABILITY = (7, 0)
"""Compute capability of the first GPUs with matrix units, which take float16: Volta."""
SHARED_MEMORY = Path("/dev/shm")
NUM_PREFETCHED = 2
"""Batches that each worker prepares in advance, torch's default."""
TENSOR_OVERHEAD = 32 * 1024
"""Bytes by which the files of a batch's tensors exceed its pixels."""


def select_device(name: str) -> torch.device:
    """Return the device of a setting; with several processes, each has its own GPU.

    Args:
        name: `auto` (a GPU if there is one), `cuda`, `cpu` or `cuda:N`.

    Raises:
        UserError: no such device.
    """
    has_gpu = torch.cuda.is_available()
    if name.startswith("cuda") and not has_gpu:
        raise UserError(
            "--device cuda: this machine has no GPU that torch can use; use --device cpu"
        )
    if name in {"auto", "cuda"}:
        return torch.device("cuda", distributed.local_rank()) if has_gpu else torch.device("cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f'--device "{name}" is no device; use auto, cpu, cuda or cuda:N') from None


def without_bfloat16(device: torch.device) -> str | None:
    """Return the reason why a device cannot compute in bfloat16, None if it can."""
    # On older GPUs torch emulates it slowly, and compilers refuse it.
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return (
        "bfloat16 takes a GPU of compute capability 8.0 (Ampere) or newer, and "
        f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
    )


def check_bfloat16(device: torch.device) -> None:
    """Raise a UserError if the device cannot compute in bfloat16."""
    reason = without_bfloat16(device)
    if reason:
        raise UserError(f"--precision bf16: {reason}; use --precision fp16")


def resolve_choices(settings: SettingsT, device: torch.device) -> SettingsT:
    """Return the settings with the device's best choices in place of `auto`."""
    best = {
        "precision": best_precision(device),
        "augment_on": best_augment_on(settings.augmentation, device),
    }
    chosen = {key: value for key, value in best.items() if getattr(settings, key) == "auto"}
    return settings.model_copy(update=chosen)


def best_augment_on(augmentation: object, device: torch.device) -> str:
    """Return the faster place of augmentation, `device` or `workers`."""
    return "device" if device.type == "cuda" and augmentation in DEVICE_LEVELS else "workers"


def best_precision(device: torch.device) -> Precision:
    """Return the fastest type of a device that training is stable in."""
    if device.type != "cuda":
        return "fp32"
    capability = torch.cuda.get_device_capability(device)
    if capability >= BFLOAT16_CAPABILITY:
        return "bf16"
    return "fp16" if capability >= FLOAT16_CAPABILITY else "fp32"


def default_workers(device: torch.device) -> int:
    """Return the number of loader workers per training process: all cores for a GPU, else none."""
    # On a CPU each layer is shared evenly among the network's threads: a worker that takes a core
    # from one of them delays all, and handing batches over costs time as well.
    if device.type == "cpu":
        return 0
    return max(1, num_cores() // distributed.local_world_size())


def fit_workers(num_workers: int, batch_bytes: int, num_held: int) -> tuple[int, int]:
    """Return the number of workers, and of prefetched batches per worker, that fit shared memory.

    Warn if these are fewer than wanted; there are no workers if no batch fits.

    Args:
        num_held: batches that the main process holds in addition.
    """
    if not num_workers or not SHARED_MEMORY.is_dir():
        return num_workers, NUM_PREFETCHED
    # Workers hand batches over in /dev/shm, which has 64 MB in a container by default.
    free = shutil.disk_usage(SHARED_MEMORY).free // distributed.local_world_size()
    num_batches = max(free // (batch_bytes + TENSOR_OVERHEAD) - num_held, 0)
    if num_workers * NUM_PREFETCHED <= num_batches:
        return num_workers, NUM_PREFETCHED
    num_fitting = min(num_workers, num_batches)
    if distributed.is_main():
        warn(
            f"{SHARED_MEMORY} has only {free / 1e6:.0f} MB for the batches of {num_workers} "
            f"workers; {num_fitting} are used, with one batch each; enlarge it with `docker run "
            "--shm-size`, or lower --num_workers",
        )
    return num_fitting, 1


def prepare(device: torch.device) -> None:
    """Select the device and turn on its fast paths: TF32, cuDNN autotuning, memory reuse."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current device
        allow_tf32(device)
        torch.backends.cudnn.benchmark = True  # pays because every batch has the same shape
    if device.type == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), num_cores()))
        keep_freed_memory()


def allow_tf32(device: torch.device) -> None:
    """Let a GPU multiply float32 matrices as TF32, with a mantissa of 10 bits."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step; do nothing with another C library."""
    # By default it returns large blocks to the kernel, which clears every page again when the next
    # step touches it.
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)
