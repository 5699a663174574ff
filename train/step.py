"""One optimizer step: gradients of some micro-batches, then an update if they are finite.

Nothing here waits for the device: `StepResult` copies a step's result and reads it later.
"""

from typing import Any

import polars as pl
import torch
from torch import Tensor

from isic.runtime.errors import first_of
from train import distributed
from train.batch import Batch, split
from train.config import TrainSettings
from train.losses import aux_loss, create_loss, mask_loss
from train.memory import fit_parts
from train.state import TrainState

MAX_NAMED = 8
"""Images that the error about a gradient names."""
# Scaling starts at 65536 and halves; an overflow at this scale is not float16's fault.
MIN_SCALE = 1e-3
"""Loss scale below which an overflow ends the run."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a precision, disabled for fp32; `auto` must be resolved."""
    dtype = DTYPES[precision]
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype)


def accumulate(
    state: TrainState,
    forward: Any,
    micro_batches: list[Batch],
    settings: TrainSettings,
    device: torch.device,
) -> Tensor:
    """Compute the gradient of the micro-batches' mean loss and return that loss, a scalar.

    If the device runs out of memory, micro-batches are cut into twice as many parts from then on.

    Raises:
        UserError: a single image does not fit, or the device of one of several processes is full.
    """

    def run(num_parts: int) -> Tensor:
        state.optimizer.zero_grad(set_to_none=True)  # those of an attempt that did not fit
        return backward(state, forward, micro_batches, num_parts, settings, device)

    loss, state.num_parts = fit_parts(
        run,
        state.num_parts,
        max(len(batch.images) for batch in micro_batches),
        device,
        # Several processes would have to agree on the number of parts.
        may_split=distributed.world_size() == 1,
    )
    return loss


def backward(
    state: TrainState,
    forward: Any,
    micro_batches: list[Batch],
    num_parts: int,
    settings: TrainSettings,
    device: torch.device,
) -> Tensor:
    """Run forward and backward passes over all micro-batches and return the mean loss, a scalar."""
    class_loss = create_loss(settings)
    total = torch.zeros((), device=device)
    parts = []
    for batch in micro_batches:
        for part in split(batch, num_parts):
            # Every image keeps its weight, however many parts there are.
            weight = len(part.images) / len(batch.images) / len(micro_batches)
            parts.append((part, weight))
    for number, (part, weight) in enumerate(parts, start=1):
        with distributed.maybe_no_sync(forward, sync=number == len(parts)):
            with autocast(device, settings.precision):
                outputs = forward(part.images)
            named = dict(zip(state.model.output_names, outputs, strict=True))
            loss = class_loss(named["logits"].squeeze(1), part.target)
            if settings.aux:
                loss = loss + settings.aux_factor * aux_loss(named["aux"], part.aux)
            if settings.mask_weight:
                loss = loss + settings.mask_weight * mask_loss(named["mask"], part.masks)
            loss = loss * weight
            state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def optimizer_step(state: TrainState, clip_grad: float, loss: Tensor) -> Tensor:
    """Clip and apply the accumulated gradient; skip the update if it or the loss is not finite.

    Returns:
        float32 [3] on the device: the loss, whether the step was skipped, whether the run has
        diverged and cannot continue.
    """
    # The order is fixed: clipping needs the unscaled gradient, and step() needs found_inf.
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad)
    skipped = 1 - (norm + loss).isfinite().float()  # the norm is finite only if all elements are
    diverged = skipped
    if state.scaler.is_enabled():
        # In float16 large gradients overflow: the scaler halves its scale and training continues.
        # In float32 and bfloat16 a value that is not finite ends the run.
        scale = state.scaler.scale(torch.ones_like(loss))
        diverged = skipped * (scale < MIN_SCALE)
    # Fused AdamW reads found_inf on the device and leaves weights and moments unchanged if it is 1.
    # state.diverged stays 1: the host learns of a bad step only some steps later, and the weights
    # must still be those before it. With float16, scaler.step() overwrites found_inf with the
    # result of this step only: steps after a divergence may change weights, which are not saved.
    state.diverged = torch.maximum(state.diverged, diverged)
    state.optimizer.found_inf = state.diverged  # type: ignore[attr-defined]
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if state.averaged:
        state.averaged.update(state.model, step=state.step)
    state.step += 1
    return torch.stack([loss, skipped, diverged])


class NonFiniteGradient(Exception):
    """The gradient of a step is not finite and the run cannot continue."""

    def __init__(self, step: int, epoch: int, rows: list[int]) -> None:
        super().__init__("the gradient is not finite")
        self.step = step
        self.epoch = epoch
        self.rows = rows

    def describe(self, ids: pl.Series) -> str:
        """Return the error message; `ids` [N] are those of the training table."""
        names = first_of([ids[row] for row in self.rows], MAX_NAMED)
        return (
            f"the gradient is not finite at step {self.step}, in epoch {self.epoch}, on the images "
            f"{names}; lower --lr and --lr_backbone, or check these images"
        )


class StepResult:
    """The result of the last optimizer step, on its way from the device to the host."""

    def __init__(self, state: TrainState, micro_batches: list[Batch], values: Tensor) -> None:
        self.step = state.step - 1
        self.epoch = state.epoch + 1
        self.rows = [batch.rows for batch in micro_batches]
        self.values = values.to("cpu", non_blocking=values.is_cuda)
        self.copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record()

    def read(self) -> tuple[float, bool]:
        """Wait for the copy. Return the loss and whether the step was skipped.

        Raises:
            NonFiniteGradient: the run has diverged.
        """
        if self.copied:
            self.copied.synchronize()
        loss, skipped, diverged = self.values.tolist()
        if diverged:
            raise NonFiniteGradient(self.step, self.epoch, torch.cat(self.rows).tolist())
        return loss, bool(skipped)
