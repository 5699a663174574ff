"""One optimizer step: gradients of some micro-batches, and weights that change where those are finite.

Nothing here asks the device for a value, which would leave it without work until the host has gone on. What a step came
to is read when it has arrived, by `Outcome`.
"""

from typing import Any

import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

from isic.runtime.arithmetic import ceil_div
from isic.runtime.errors import UserError
from train import distributed
from train.config import TrainSettings
from train.data import Batch
from train.losses import focal_loss, mask_loss
from train.state import TrainState

MAX_NAMED = 8
"""Images that the message on a gradient names."""
MIN_SCALE = 1e-3
"""Loss scale under which an overflow is no longer float16's fault; scaling starts at 65536."""


def accumulate(
    state: TrainState,
    forward: Any,
    micro_batches: list[Batch],
    settings: TrainSettings,
    device: torch.device,
) -> Tensor:
    """Adds the gradient of the micro-batches' mean loss to the weights and returns that loss, a scalar.

    Where the GPU's memory does not hold a micro-batch, it is cut into twice as many parts, here and from then on: the
    optimizer step still sees every image once and with the same weight.

    Raises:
        UserError: a part of one image does not fit, or there are several processes, which cut alike or not at all.
    """
    while True:
        try:
            return backward(state, forward, micro_batches, settings, device)
        except torch.OutOfMemoryError:
            largest = max(len(batch.images) for batch in micro_batches)
            if distributed.world_size() > 1 or state.num_parts >= largest:
                raise UserError(
                    f"the memory of {device} does not hold {ceil_div(largest, state.num_parts)} images; use a smaller "
                    "--batch_size, --grad_checkpointing true or a smaller --image_size"
                ) from None
            state.num_parts *= 2
            size = ceil_div(settings.batch_size, state.num_parts)
            tqdm.write(
                f"out of memory: micro-batches of {size} instead, {state.num_parts} times as many a step"
            )
        state.optimizer.zero_grad(
            set_to_none=True
        )  # outside `except`, whose traceback holds the activations
        if device.type == "cuda":
            torch.cuda.empty_cache()


def backward(
    state: TrainState,
    forward: Any,
    micro_batches: list[Batch],
    settings: TrainSettings,
    device: torch.device,
) -> Tensor:
    """One forward and backward pass over every part of every micro-batch. Returns the mean loss, a scalar."""
    total = torch.zeros((), device=device)
    parts = [
        (part, len(batch.images))
        for batch in micro_batches
        for part in split(batch, state.num_parts)
    ]
    for number, (part, size) in enumerate(parts, start=1):
        with distributed.averaging(forward, now=number == len(parts)):
            with autocast(settings, device):
                outputs = forward(part.images)
            loss = focal_loss(outputs[1].squeeze(1), part.target, settings)
            if settings.mask_weight:
                loss = loss + settings.mask_weight * mask_loss(outputs[2], part.masks)
            loss = loss * (len(part.images) / size / len(micro_batches))
            state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def split(batch: Batch, num_parts: int) -> list[Batch]:
    """Cuts a batch into at most `num_parts` parts of about the same size."""
    size = ceil_div(len(batch.images), num_parts)
    return [
        Batch(*(part[at : at + size] for part in batch)) for at in range(0, len(batch.images), size)
    ]


def autocast(settings: TrainSettings, device: torch.device) -> torch.autocast:
    dtype = torch.float16 if settings.fp16 else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=settings.fp16 or settings.bf16)


def optimizer_step(state: TrainState, settings: TrainSettings, loss: Tensor) -> Tensor:
    """Clips and applies the accumulated gradient where it and the loss are finite; otherwise the weights stay.

    Fused AdamW reads on the device whether to leave a step out. In float32 and bfloat16 a gradient that is not finite
    ends the run, and all further steps are left out as well, so that the weights are those before it when the host
    learns of it. In float16 the scaler decides for each step by itself: the gradient ends the run only at the smallest
    loss scale, and steps that are under way then may still change the weights, which are not saved.

    Returns:
        float32 [3] on the device: the loss, whether the step was left out, and whether the run cannot go on.
    """
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), settings.clip_grad)
    left_out = 1 - (norm + loss).isfinite().float()
    scale = state.scaler.scale(torch.ones_like(loss))
    hopeless = left_out * (scale < MIN_SCALE) if settings.fp16 else left_out
    state.stopped = torch.maximum(state.stopped, hopeless)
    state.optimizer.found_inf = state.stopped  # type: ignore[attr-defined] # the float16 scaler replaces it
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if state.averaged:
        state.averaged.update(state.model, step=state.step)
    state.step += 1
    return torch.stack([loss, left_out, hopeless])


class NotFinite(Exception):
    """The gradient of a step is not finite and the run cannot go on."""

    def __init__(self, step: int, epoch: int, rows: list[int]) -> None:
        super().__init__("the gradient is not finite")
        self.step, self.epoch, self.rows = step, epoch, rows

    def sentence(self, ids: pl.Series) -> str:
        """Says where it happened, with the ids of the table that the rows belong to."""
        names = ", ".join(ids[row] for row in self.rows[:MAX_NAMED])
        more = f" and {len(self.rows) - MAX_NAMED} more" if len(self.rows) > MAX_NAMED else ""
        return (
            f"the gradient is not finite at step {self.step}, in epoch {self.epoch}, on the images {names}{more}; "
            "lower --lr and --lr_backbone, or look at these images"
        )


class Outcome:
    """What a step came to, on its way from the device to the host."""

    def __init__(self, state: TrainState, micro_batches: list[Batch], values: Tensor) -> None:
        """Starts to copy `values`, as `optimizer_step` returns them, of the step that `state` has just made."""
        self.step, self.epoch = state.step - 1, state.epoch + 1
        self.rows = [batch.rows for batch in micro_batches]
        self.values = values.to("cpu", non_blocking=values.is_cuda)
        self.arrived = torch.cuda.Event() if values.is_cuda else None  # type: ignore[no-untyped-call]
        if self.arrived:
            self.arrived.record()

    def read(self) -> tuple[float, bool]:
        """Waits until the device has made the step. Returns its loss and whether loss scaling left it out.

        Raises:
            NotFinite: the gradient is not finite, and no loss scaling is there to deal with it, or it tried in vain.
        """
        if self.arrived:
            self.arrived.synchronize()
        loss, left_out, hopeless = self.values.tolist()
        if hopeless:
            raise NotFinite(self.step, self.epoch, torch.cat(self.rows).tolist())
        return loss, bool(left_out)
