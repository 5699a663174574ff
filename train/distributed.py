"""Several processes that train one model, as torchrun starts them. With one process everything here does nothing."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others: the first one alone validates, saves and reads the data before them."""

T = TypeVar("T")


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started, where it did."""
    if "RANK" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    yield
    dist.destroy_process_group()  # not after an error: the other processes would not answer


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process on its machine, and so of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def from_main(value: T) -> T:
    """Returns the main process's value in all of them."""
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    shared: T = values[0]
    return shared


def gather(value: T) -> list[T]:
    """Returns every process's value, in the order of their ranks, in all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def share(module: nn.Module) -> None:
    """Copies the main process's weights and buffers into the other processes' module."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def parallel(module: Any) -> Any:
    """Returns the module with its gradient averaged over the processes in every backward pass."""
    return module if world_size() == 1 else DistributedDataParallel(module)


def averaging(module: Any, now: bool) -> contextlib.AbstractContextManager[Any]:
    """Within the block gradients are averaged over the processes, or only added up until a later block does it."""
    return (
        module.no_sync()
        if isinstance(module, DistributedDataParallel) and not now
        else contextlib.nullcontext()
    )
