"""One fold, from the first batch to its checkpoint and out-of-fold scores."""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from timm.data import Mixup
from torch import Tensor
from tqdm import tqdm

from isic import interrupt, schema
from isic.errors import UserError
from isic.metrics import pauc, roc_auc
from train import distributed
from train.checkpoint import LAST
from train.config import TrainSettings
from train.data import Batch, TrainData, fold_loaders
from train.losses import dice, focal_loss, mask_loss
from train.model import Classifier, preprocess_spec
from train.optim import lr_schedule, set_lr
from train.outputs import EpochStats, Predictions, begin_fold, log_epoch, save_fold
from train.state import TrainState, create_state, restore, save_last

MAX_NAMED = 8
"""Images that the message on a gradient names."""
MIN_SCALE = 1e-3
"""Loss scale under which an overflow is no longer float16's fault; scaling starts at 65536."""


def train_fold(settings: TrainSettings, data: TrainData, fold: int) -> None:
    """Trains one fold and writes its folder: checkpoints, history, and the scores of the held-out rows.

    Raises:
        UserError: the fold cannot be trained on, or the loss stopped being a finite number.
    """
    directory, device = settings.fold_dir(fold), select_device(settings.device)
    loader, sampler, held_out = fold_loaders(data, fold, preprocess_spec(settings), settings)
    steps_per_epoch = -(-len(loader) // settings.accumulation_steps)
    schedule = lr_schedule(steps_per_epoch * settings.epochs, round(steps_per_epoch * settings.warmup_epochs))
    state = create_state(settings, device, fold)
    resumes = distributed.from_main(settings.resume and (directory / LAST).is_file())
    if resumes:
        restore(state, directory / LAST, settings, data)
    begin_fold(settings, fold, resumes)
    if not resumes:
        save_last(directory / LAST, state, settings, data)  # what a run stopped within its first epoch goes on from
    network: Any = torch.compile(state.model) if settings.compile else state.model
    forward: Any = None

    while state.epoch < settings.epochs:
        seed_epoch(settings, fold, state.epoch)
        sampler.epoch = state.epoch
        if forward is None or state.epoch == settings.freeze_epochs:
            state.model.backbone.requires_grad_(state.epoch >= settings.freeze_epochs)
            forward = distributed.parallel(network)  # it must know which weights will have a gradient
        try:
            stats = train_epoch(state, forward, loader, schedule, settings, device, f"fold {fold}")
        except NotFinite as error:
            raise UserError(error.sentence(data.table[schema.ID])) from None
        distributed.share(state.evaluated)  # each process has its own moving average and batch statistics
        held = Predictions.joined(distributed.gather(predict(state.evaluated, held_out, settings, device)))
        state.epoch += 1
        scores = score(data.target[held.rows], held)
        chosen = scores["pauc"] > state.best_pauc if settings.select_epoch == "best" else state.epoch == settings.epochs
        state.best_pauc = max(scores["pauc"], state.best_pauc) if settings.select_epoch == "best" else scores["pauc"]
        stats = EpochStats.joined(distributed.gather(stats))
        if chosen:
            save_fold(directory, state, settings, data, fold, held)
        log_epoch(directory, settings, fold, state, stats, scores)
        save_last(directory / LAST, state, settings, data)  # at last: a run killed before it repeats the epoch


def seed_epoch(settings: TrainSettings, fold: int, epoch: int) -> None:
    """Seeds what an epoch draws, so that it repeats after a resume; each process drops other units."""
    torch.manual_seed(hash((settings.seed, fold, epoch)) + distributed.rank())
    np.random.seed(hash((settings.seed, fold, epoch, distributed.rank())) % 2**32)  # noqa: NPY002 - timm's Mixup draws here


def select_device(name: str) -> torch.device:
    """Returns the device of a setting: `auto` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda", distributed.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that torch can use; use --device cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f'--device "{name}" is no device; use auto, cpu, cuda or cuda:N') from None


def train_epoch(
    state: TrainState,
    forward: Any,
    loader: Iterable[Batch],
    schedule: NDArray[np.float64],
    settings: TrainSettings,
    device: torch.device,
    title: str,
) -> EpochStats:
    """Learns from every batch of an epoch once; `settings.accumulation_steps` batches make an optimizer step.

    Raises:
        NotFinite: the gradient is not finite; the weights are those before the step.
        UserError: a single image does not fit the GPU's memory.
    """
    state.model.train()
    stats, started = EpochStats(), time.perf_counter()
    batches = Waiting(loader)
    progress = tqdm(
        batches,
        desc=f"{title} epoch {state.epoch + 1}/{settings.epochs}",
        leave=False,
        disable=None if distributed.is_main() else True,
    )
    mix = create_mixup(settings)
    for micro_batches in batched(progress, settings.accumulation_steps):
        interrupt.check()
        set_lr(state.optimizer, schedule[state.step])
        mixed = [mix(to_device(batch, device)) for batch in micro_batches]
        loss = accumulate(state, forward, mixed, settings, device)
        stats.skipped_steps += optimizer_step(state, settings, micro_batches)
        stats.losses.append(loss.item())
        stats.num_images += sum(len(batch.images) for batch in micro_batches)
        progress.set_postfix(
            loss=f"{np.mean(stats.losses[-50:]):.4f}",
            lr=f"{state.optimizer.param_groups[-1]['lr']:.1e}",
            img_s=f"{stats.num_images / (time.perf_counter() - started):.0f}",
        )
    stats.seconds, stats.waiting = time.perf_counter() - started, batches.seconds
    return stats


def to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(part.to(device, non_blocking=True) for part in batch))


def create_mixup(settings: TrainSettings) -> Callable[[Batch], Batch]:
    """Returns what mixes the images of a batch and their targets, or passes the batch on where the config mixes none.

    A batch of an odd number, the only one of a small dataset, stays as it is: images are mixed in pairs.
    """
    if not settings.mixes:
        return lambda batch: batch
    mixup = Mixup(settings.mixup, settings.cutmix, label_smoothing=0.0, num_classes=2)

    def mix(batch: Batch) -> Batch:
        if len(batch.images) % 2:
            return batch
        # timm cuts and pastes along the last two axes, so it sees the pixels with channels first
        pixels, target = mixup(batch.images.float().permute(0, 3, 1, 2), batch.target.long())
        return batch._replace(images=pixels.permute(0, 2, 3, 1), target=target[:, 1])

    return mix


def accumulate(
    state: TrainState, forward: Any, micro_batches: list[Batch], settings: TrainSettings, device: torch.device
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
                    f"the memory of {device} does not hold {-(-largest // state.num_parts)} images; use a smaller "
                    "--batch_size, --grad_checkpointing true or a smaller --image_size"
                ) from None
            state.num_parts *= 2
            size = -(-settings.batch_size // state.num_parts)
            tqdm.write(f"out of memory: micro-batches of {size} instead, {state.num_parts} times as many a step")
        state.optimizer.zero_grad(set_to_none=True)  # outside `except`, whose traceback holds the activations
        if device.type == "cuda":
            torch.cuda.empty_cache()


def backward(
    state: TrainState, forward: Any, micro_batches: list[Batch], settings: TrainSettings, device: torch.device
) -> Tensor:
    """One forward and backward pass over every part of every micro-batch. Returns the mean loss, a scalar."""
    total = torch.zeros((), device=device)
    parts = [(part, len(batch.images)) for batch in micro_batches for part in split(batch, state.num_parts)]
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
    size = -(-len(batch.images) // num_parts)
    return [Batch(*(part[at : at + size] for part in batch)) for at in range(0, len(batch.images), size)]


class NotFinite(Exception):
    """The gradient of a step is not finite; the weights are those before the step."""

    def __init__(self, state: TrainState, micro_batches: list[Batch]) -> None:
        super().__init__("the gradient is not finite")
        self.step, self.epoch = state.step, state.epoch + 1
        self.rows: list[int] = torch.cat([batch.rows for batch in micro_batches]).tolist()

    def sentence(self, ids: pl.Series) -> str:
        """Says where it happened, with the ids of the table that the rows belong to."""
        names = ", ".join(ids[row] for row in self.rows[:MAX_NAMED])
        more = f" and {len(self.rows) - MAX_NAMED} more" if len(self.rows) > MAX_NAMED else ""
        return (
            f"the gradient is not finite at step {self.step}, in epoch {self.epoch}, on the images {names}{more}; "
            "lower --lr and --lr_backbone, or look at these images"
        )


def optimizer_step(state: TrainState, settings: TrainSettings, micro_batches: list[Batch]) -> bool:
    """Clips and applies the accumulated gradient.

    Returns:
        Whether loss scaling left the step out.

    Raises:
        NotFinite: the gradient is not finite, and no loss scaling is there to deal with it, or it has tried in vain.
    """
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), settings.clip_grad)
    if not norm.isfinite() and (not settings.fp16 or state.scaler.get_scale() < MIN_SCALE):
        raise NotFinite(state, micro_batches)
    scale = state.scaler.get_scale()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if state.averaged:
        state.averaged.update(state.model, step=state.step)
    state.step += 1
    return state.scaler.get_scale() < scale


@torch.inference_mode()
def predict(model: Classifier, loader: Iterable[Batch], settings: TrainSettings, device: torch.device) -> Predictions:
    """Returns what the model says of the loader's rows; how well it draws only where it was taught to."""
    model.eval()
    rows, logits, overlap = [], [], []
    for batch in loader:
        images, masks = batch.images.to(device, non_blocking=True), batch.masks.to(device, non_blocking=True)
        with autocast(settings, device):
            outputs = model(images)
        rows.append(batch.rows)
        logits.append(outputs[1].squeeze(1))
        if settings.mask_weight:
            overlap.append(dice(outputs[2], masks))
    no_overlap = torch.full((sum(map(len, rows)),), torch.nan)
    return Predictions(
        torch.cat(rows).numpy(),
        torch.cat(logits).float().cpu().numpy(),
        (torch.cat(overlap).cpu() if overlap else no_overlap).numpy(),
    )


def score(target: NDArray[np.float32], held: Predictions) -> dict[str, float]:
    """Returns `pauc`, `auc` and, where held-out images have masks, their mean `dice`."""
    scores = {"pauc": pauc(target, held.logits), "auc": roc_auc(target, held.logits)}
    drawn = held.dice[~np.isnan(held.dice)]
    return {**scores, "dice": float(drawn.mean())} if len(drawn) else scores


def autocast(settings: TrainSettings, device: torch.device) -> torch.autocast:
    dtype = torch.float16 if settings.fp16 else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=settings.fp16 or settings.bf16)


class Waiting:
    """Iterates over batches and adds up the seconds spent waiting for them."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.seconds = loader, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch


T = TypeVar("T")


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields lists of `size` items, the last one shorter (itertools.batched, which Python 3.11 lacks)."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
