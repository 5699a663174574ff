"""One fold, from the first batch to its checkpoint and out-of-fold scores."""

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss
from tqdm import tqdm

from isic.errors import UserError
from isic.metrics import pauc, roc_auc
from train.checkpoint import LAST
from train.config import TrainSettings
from train.data import Batch, TrainData, fold_loaders
from train.model import Classifier, preprocess_spec
from train.optim import lr_schedule, set_lr
from train.outputs import HISTORY_FILE, EpochStats, begin_fold, log_epoch, save_fold
from train.state import TrainState, create_state, restore, save_last


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
    begin_fold(settings, fold)
    if settings.resume and (directory / LAST).is_file():
        restore(state, directory / LAST, settings, data)
    forward: Any = torch.compile(state.model) if settings.compile else state.model

    while state.epoch < settings.epochs:
        torch.manual_seed(hash((settings.seed, fold, state.epoch)))  # so that an epoch repeats after a resume
        sampler.epoch = state.epoch
        state.model.backbone.requires_grad_(state.epoch >= settings.freeze_epochs)
        stats = train_epoch(state, forward, loader, schedule, settings, device, f"fold {fold}")
        rows, logits = predict(state.evaluated, held_out, settings, device)
        state.epoch += 1
        score = pauc(data.target[rows], logits)
        chosen = score > state.best_pauc if settings.select_epoch == "best" else state.epoch == settings.epochs
        state.best_pauc = max(score, state.best_pauc) if settings.select_epoch == "best" else score
        if chosen:
            save_fold(directory, state, settings, data, fold, rows, logits)
        save_last(directory / LAST, state, settings, data)
        auc = roc_auc(data.target[rows], logits)
        log_epoch(directory / HISTORY_FILE, settings, fold, state, stats, {"pauc": score, "auc": auc})


def select_device(name: str) -> torch.device:
    """Returns the device of a setting: `auto` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    """Learns from every batch of an epoch once; `settings.accumulation_steps` batches make an optimizer step."""
    state.model.train()
    stats, started = EpochStats(), time.perf_counter()
    batches = Waiting(loader)
    progress = tqdm(batches, desc=f"{title} epoch {state.epoch + 1}/{settings.epochs}", leave=False, disable=None)
    for micro_batches in batched(progress, settings.accumulation_steps):
        set_lr(state.optimizer, schedule[state.step])
        loss = torch.zeros((), device=device)
        for images, target, _ in micro_batches:
            with autocast(settings, device):
                _, logits = forward(images.to(device, non_blocking=True))
            part = focal_loss(logits.squeeze(1), target.to(device, non_blocking=True), settings) / len(micro_batches)
            state.scaler.scale(part).backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
            stats.num_images += len(images)
        stats.skipped_steps += optimizer_step(state, settings, micro_batches)
        stats.losses.append(loss.item())
        progress.set_postfix(
            loss=f"{np.mean(stats.losses[-50:]):.4f}", lr=f"{state.optimizer.param_groups[-1]['lr']:.1e}"
        )
    stats.seconds, stats.waiting = time.perf_counter() - started, batches.seconds
    return stats


def focal_loss(logits: Tensor, target: Tensor, settings: TrainSettings) -> Tensor:
    """Mean focal loss (Lin et al. 2017, arXiv 1708.02002, eq. 5) of logits [N] and targets [N], in float32."""
    loss: Tensor = sigmoid_focal_loss(
        logits.float(), target, alpha=settings.focal_alpha, gamma=settings.focal_gamma, reduction="mean"
    )
    return loss


def optimizer_step(state: TrainState, settings: TrainSettings, micro_batches: list[Batch]) -> bool:
    """Clips and applies the accumulated gradient.

    Returns:
        Whether loss scaling left the step out.

    Raises:
        UserError: the gradient is not finite, and loss scaling is not there to deal with it. Weights are untouched.
    """
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), settings.clip_grad)
    if not settings.fp16 and not norm.isfinite():
        rows = torch.cat([rows for _, _, rows in micro_batches]).tolist()
        raise UserError(
            f"the gradient is not finite at step {state.step} of epoch {state.epoch + 1} (rows {rows[:8]}... of the "
            "table); lower --lr and --lr_backbone, or look at these images"
        )
    scale = state.scaler.get_scale()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if state.averaged:
        state.averaged.update(state.model, step=state.step)
    state.step += 1
    return state.scaler.get_scale() < scale


@torch.inference_mode()
def predict(
    model: Classifier, loader: Iterable[Batch], settings: TrainSettings, device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Returns the rows [N] and their logits [N] float32."""
    model.eval()
    rows, logits = [], []
    for images, _, batch_rows in loader:
        with autocast(settings, device):
            logits.append(model(images.to(device, non_blocking=True))[1].squeeze(1))
        rows.append(batch_rows)
    return torch.cat(rows).numpy(), torch.cat(logits).float().cpu().numpy()


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
