"""A batch of images as the training loop takes it."""

from typing import NamedTuple

import torch
from torch import Tensor

from isic.runtime.arithmetic import ceil_div

NO_MASK = 255
"""Every pixel of the mask of an image that has none; pixels of a mask are 0 or 1."""


class Batch(NamedTuple):
    """N rows of the training table."""

    images: Tensor
    """uint8 [N, size, size, 3], RGB; float32 after mixup or cutmix."""
    target: Tensor
    """float32 [N]."""
    rows: Tensor
    """int64 [N], row numbers in the training table."""
    masks: Tensor = torch.empty(0)
    """uint8 [N, size, size], 1 on the lesion, NO_MASK for an image without; empty if not used."""
    seeds: Tensor = torch.empty(0, dtype=torch.int64)
    """int64 [N], of the augmentation; [0] if not used."""
    aux: Tensor = torch.empty(0)
    """float32 [N, K], auxiliary targets, NaN for a row without one; [0] if not used."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device, without waiting for the copy if its memory is pinned."""
    return Batch(*(part.to(device, non_blocking=True) for part in batch))


def with_aux(batch: Batch, targets: Tensor | None) -> Batch:
    """Return a batch with its rows of the auxiliary targets of all rows, if there are any.

    Args:
        targets: float32 [number of rows, K], on the batch's device.
    """
    return batch if targets is None else batch._replace(aux=targets[batch.rows])


def split(batch: Batch, num_parts: int) -> list[Batch]:
    """Cut a batch into at most `num_parts` parts of about the same size."""
    size = ceil_div(len(batch.images), num_parts)
    starts = range(0, len(batch.images), size)
    return [Batch(*(part[start : start + size] for part in batch)) for start in starts]
