"""Training in several processes, as torchrun starts them; with one process all of it is a no-op."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Only the main process writes checkpoints, and disks can be slow.
TIMEOUT = timedelta(hours=2)
"""Longest wait for another process."""

_T = TypeVar("_T")


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, if it did."""
    if "RANK" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    yield
    # Not in a `finally`: after an error it would wait for processes that no longer answer.
    dist.destroy_process_group()


def leave_together() -> None:
    """Leave the group before an error that ends all processes."""
    # A process that ends as a member may be aborted: gloo's threads are still running then.
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes on all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Return the number of this process on its machine, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank() == 0


def broadcast_object(value: _T) -> _T:
    """Return the main process's value."""
    if world_size() == 1:
        return value
    # The list is overwritten in all processes but the main one.
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    received: _T = values[0]
    return received


def gather(value: _T) -> list[_T]:
    """Return the values of all processes in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_weights(module: nn.Module) -> None:
    """Overwrite a module's weights and buffers with those of the main process."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def wrap_ddp(module: Any) -> Any:
    """Wrap a module so that a backward pass averages its gradient over the processes."""
    return module if world_size() == 1 else DistributedDataParallel(module)


def maybe_no_sync(module: Any, sync: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which backward passes do not average gradients unless `sync`."""
    if sync or not isinstance(module, DistributedDataParallel):
        return contextlib.nullcontext()
    return module.no_sync()
