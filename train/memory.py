"""A device whose memory is full: smaller parts of a batch, or one sentence."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from tqdm import tqdm

from isic.runtime.arithmetic import ceil_div
from isic.runtime.errors import UserError

LESS_MEMORY = "lower --batch_size or --image_size, or set --grad_checkpointing true"
"""The remedy for activations that do not fit."""

_Result = TypeVar("_Result")


@contextlib.contextmanager
def memory_errors(device: torch.device, remedy: str = LESS_MEMORY) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into a UserError with the remedy."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"{device} is out of memory; {remedy}") from None


def fit_parts(
    run: Callable[[int], _Result],
    num_parts: int,
    num_images: int,
    device: torch.device,
    may_split: bool = True,
) -> tuple[_Result, int]:
    """Call `run` with a number of parts, doubled while the device is out of memory.

    Args:
        run: processes a batch in that many parts.
        num_images: of the batch.
        may_split: whether more parts may be tried.

    Returns:
        The result of `run`, and the number of parts that fitted.

    Raises:
        UserError: a single image does not fit, or more parts may not be tried.
    """
    while True:
        try:
            return run(num_parts), num_parts
        except torch.OutOfMemoryError:
            if not may_split or num_parts >= num_images:
                size = ceil_div(num_images, num_parts)
                raise UserError(
                    f"{device} is out of memory with {size} images at a time; {LESS_MEMORY}"
                ) from None
        # Outside of `except`: the exception's traceback keeps the activations alive.
        num_parts *= 2
        size = ceil_div(num_images, num_parts)
        tqdm.write(f"{device} is out of memory: continuing with {size} images at a time")
        if device.type == "cuda":
            torch.cuda.empty_cache()
