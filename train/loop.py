"""One fold, from the first batch to its checkpoint and out-of-fold scores."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import Mixup
from tqdm import tqdm

from isic import schema
from isic.metrics import pauc, roc_auc
from isic.runtime import interrupt
from isic.runtime.arithmetic import ceil_div
from isic.runtime.errors import UserError
from train import distributed
from train.checkpoint import LAST
from train.config import TrainSettings
from train.data import Batch, TrainData, fold_loaders, report_composition
from train.losses import dice
from train.machine import select_device
from train.model import preprocess_spec
from train.optim import Schedule, create_schedule, set_lr
from train.outputs import EpochStats, Predictions, begin_fold, log_epoch, loss_text, save_fold
from train.state import TrainState, create_state, restore, save_last
from train.step import NotFinite, Outcome, accumulate, autocast, optimizer_step, split
from train.threads import set_threads

STEPS_AHEAD = 2
"""Optimizer steps that the host prepares while the device is at work, so that the device never waits for the host."""


def train_fold(settings: TrainSettings, data: TrainData, fold: int) -> None:
    """Trains one fold and writes its folder: checkpoints, history, and the scores of the held-out rows.

    Raises:
        UserError: the fold cannot be trained on, or the loss stopped being a finite number.
    """
    directory, device = settings.fold_dir(fold), select_device(settings.device)
    loader, sampler, held_out = fold_loaders(data, fold, preprocess_spec(settings), settings)
    steps_per_epoch = ceil_div(len(loader), settings.accumulation_steps)
    schedule = create_schedule(settings, steps_per_epoch)
    state = create_state(settings, device, fold)
    resumes = distributed.from_main(settings.resume and (directory / LAST).is_file())
    if resumes:
        restore(state, directory / LAST, settings, data)
        if state.epoch == settings.epochs:
            raise UserError(
                f"the last epoch of {directory} is done, but its results are gone; add --force"
            )
    threads = set_threads(state.model, settings, device, state.num_threads)
    if distributed.is_main():
        report_composition(sampler.pools, fold)
        if threads:
            print(f"fold {fold}: {threads}", flush=True)
    begin_fold(settings, data, fold, resumes)
    if not resumes:
        save_last(
            directory / LAST, state, settings, data
        )  # what a run stopped within its first epoch goes on from
    network: Any = torch.compile(state.model) if settings.compile else state.model
    forward: Any = None

    while state.epoch < settings.epochs:
        seed_epoch(settings, fold, state.epoch)
        sampler.epoch = state.epoch
        if forward is None or state.epoch == settings.freeze_epochs:
            state.model.backbone.requires_grad_(state.epoch >= settings.freeze_epochs)
            forward = distributed.parallel(
                network
            )  # it must know which weights will have a gradient
        try:
            stats = train_epoch(state, forward, loader, schedule, settings, device, f"fold {fold}")
        except NotFinite as error:
            raise UserError(error.sentence(data.table[schema.ID])) from None
        distributed.share(
            state.evaluated
        )  # each process has its own moving average and batch statistics
        held = Predictions.joined(distributed.gather(predict(state, held_out, settings, device)))
        state.epoch += 1
        scores = score(data.target[held.rows], held)
        if settings.select_epoch == "best":
            chosen = state.epoch == 1 or scores["pauc"] > state.best_pauc
        else:
            chosen = state.epoch == settings.epochs
        state.best_pauc = (
            scores["pauc"] if chosen or settings.select_epoch == "last" else state.best_pauc
        )
        stats = EpochStats.joined(distributed.gather(stats))
        if chosen:
            save_fold(directory, state, settings, data, fold, held)
        log_epoch(directory, settings, fold, state, stats, scores)
        save_last(
            directory / LAST, state, settings, data
        )  # at last: a run killed before it repeats the epoch


def seed_epoch(settings: TrainSettings, fold: int, epoch: int) -> None:
    """Seeds what an epoch draws, so that it repeats after a resume; each process drops other units."""
    torch.manual_seed(hash((settings.seed, fold, epoch)) + distributed.rank())
    np.random.seed(hash((settings.seed, fold, epoch, distributed.rank())) % 2**32)  # noqa: NPY002 - timm's Mixup draws here


def train_epoch(
    state: TrainState,
    forward: Any,
    loader: Iterable[Batch],
    schedule: Schedule,
    settings: TrainSettings,
    device: torch.device,
    title: str,
) -> EpochStats:
    """Learns from every batch of an epoch once; `settings.accumulation_steps` batches make an optimizer step.

    Raises:
        NotFinite: the gradient is not finite; in float32 and bfloat16 the weights are those before the step.
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
    mix, outcomes = create_mixup(settings), deque[Outcome]()
    for micro_batches in batched(progress, settings.accumulation_steps):
        interrupt.raise_if_interrupted()
        set_lr(state.optimizer, schedule, state.step)
        mixed = [mix(to_device(batch, device)) for batch in micro_batches]
        loss = accumulate(state, forward, mixed, settings, device)
        outcomes.append(Outcome(state, micro_batches, optimizer_step(state, settings, loss)))
        stats.num_images += sum(len(batch.images) for batch in micro_batches)
        if len(outcomes) > STEPS_AHEAD:
            stats.add(*outcomes.popleft().read())
            show(progress, stats, state, time.perf_counter() - started)
    for outcome in outcomes:
        stats.add(*outcome.read())
    stats.seconds, stats.waiting = time.perf_counter() - started, batches.seconds
    return stats


def show(progress: "tqdm[Batch]", stats: EpochStats, state: TrainState, seconds: float) -> None:
    """Puts loss, learning rate of the head and speed into the progress bar, which is drawn when it is due."""
    progress.set_postfix(
        loss=loss_text(stats, last=50),
        lr=f"{state.optimizer.param_groups[-1]['lr']:.1e}",
        img_s=f"{stats.num_images / seconds:.0f}",
        refresh=False,
    )


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


@torch.inference_mode()
def predict(
    state: TrainState, loader: Iterable[Batch], settings: TrainSettings, device: torch.device
) -> Predictions:
    """Returns what the model says of the loader's rows; how well it draws only where it was taught to."""
    model = state.evaluated.eval()
    rows, logits, overlap = [], [], []
    for whole in Waiting(loader):
        for batch in split(whole, state.num_parts):
            on_device = to_device(batch, device)
            with autocast(settings, device):
                outputs = model(on_device.images)
            rows.append(batch.rows)
            logits.append(outputs[1].squeeze(1))
            if settings.mask_weight:
                overlap.append(dice(outputs[2], on_device.masks))
    no_overlap = torch.full((sum(map(len, rows)),), torch.nan)
    return Predictions(
        torch.cat(rows).numpy(),
        torch.cat(logits).float().cpu().numpy(),
        (torch.cat(overlap).cpu() if overlap else no_overlap).numpy(),
    )


def score(target: NDArray[np.float32], held: Predictions) -> dict[str, float]:
    """Returns `pauc`, `auc` and, where held-out images have masks, their mean `dice`.

    Raises:
        UserError: a score is not finite.
    """
    if not np.isfinite(held.logits).all():
        raise UserError(
            "the network's scores of held-out images are not finite; lower --lr, or use --bf16 for --fp16"
        )
    scores = {"pauc": pauc(target, held.logits), "auc": roc_auc(target, held.logits)}
    drawn = held.dice[~np.isnan(held.dice)]
    return {**scores, "dice": float(drawn.mean())} if len(drawn) else scores


class Waiting:
    """Iterates over batches and adds up the seconds spent waiting for them."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.seconds = loader, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        with interrupt.defer_signals():
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
