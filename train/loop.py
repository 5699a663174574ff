"""Training of one fold, from the first batch to its checkpoint and out-of-fold scores."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from isic.layout import LAST_CHECKPOINT, Fold, fold_dir
from isic.runtime import interrupt
from isic.runtime.arithmetic import ceil_div
from isic.runtime.errors import UserError
from isic.runtime.progress import TimeLeft
from train import distributed
from train.augmentation.device import create_device_augmentation
from train.batch import Batch, to_device, with_aux
from train.config import TrainSettings
from train.deadline import Deadline, OutOfTime
from train.decoded import keep_repeated
from train.fold_files import begin_fold, save_fold
from train.history import EpochStats, Validation, log_epoch
from train.loaders import FoldLoaders, TimedLoader, fold_loaders
from train.memory import memory_errors
from train.mixup import create_mixup
from train.optim import Schedule, allocate_moments, create_schedule, learning_rates, set_lr
from train.predict import Predictions, predict, score
from train.rows import TrainData
from train.sampling import report_composition
from train.seeds import seed_epoch
from train.state import TrainState, create_state, restore, save_last
from train.step import StepResult, accumulate, optimizer_step
from train.targets import target_matrix, target_scores
from train.threads import set_threads

# So that neither the device nor the host waits for the other.
STEPS_AHEAD = 2
"""Steps queued on the device before the host reads a result."""


def train_fold(
    settings: TrainSettings,
    data: TrainData,
    fold: Fold,
    device: torch.device,
    deadline: Deadline,
    time_left: TimeLeft | None = None,
) -> None:
    """Train one fold and write its folder; `time_left` counts the epochs of the run.

    Raises:
        UserError: the fold lacks rows of a class, or logits are not finite.
        NonFiniteGradient: the run has diverged.
        OutOfTime: another epoch would exceed the deadline.
    """
    deadline.begin_fold()
    training = FoldTraining.begin(settings, data, fold, device)
    costs = training.loaders.epoch_costs(settings)
    first_epoch = training.state.epoch
    if time_left:
        time_left.skip(costs[:first_epoch].sum())
    for epoch in range(first_epoch, settings.epochs):
        stats = training.train_next_epoch()
        predictions = training.predict_held_out()
        training.save(stats, predictions)
        if time_left and distributed.is_main():
            time_left.advance(costs[epoch])
        deadline.end_epoch(costs[epoch])
        is_last = epoch + 1 == settings.epochs
        if not is_last and not deadline.allows_epoch(costs[epoch + 1]):
            raise OutOfTime(fold, epoch + 2)


@dataclass
class FoldTraining:
    """The parts of a fold's training that its epochs share."""

    settings: TrainSettings
    data: TrainData
    fold: Fold
    device: torch.device
    state: TrainState
    loaders: FoldLoaders
    schedule: Schedule
    aux: NDArray[np.float32]
    """[number of rows, K], auxiliary targets of all rows."""
    network: Any
    """`state.model`, or that by torch.compile."""
    compiled: Any | None
    """`state.evaluated` by torch.compile."""
    forward: Any | None = None
    """`network` as the processes train it together."""

    @classmethod
    def begin(
        cls, settings: TrainSettings, data: TrainData, fold: Fold, device: torch.device
    ) -> "FoldTraining":
        """Prepare or resume a fold.

        Raises:
            UserError: it lacks rows of a class, or cannot be resumed.
        """
        state = create_state(settings, device, fold)
        loaders = fold_loaders(data, fold, state.model.spec, settings, device)
        if distributed.is_main():
            report_composition(loaders.sampler.pools, fold)
        start_or_resume(state, settings, data, fold, device)
        with memory_errors(device, f"choose a smaller --model than {settings.model}"):
            allocate_moments(state.optimizer)
        directory = fold_dir(settings.run_dir, fold)
        uses = loaders.count_uses(settings, state.epoch)
        keep_repeated(loaders.decoded, uses, settings.cache, directory, f"fold {fold}")
        schedule = create_schedule(
            ceil_div(len(loaders.training), settings.accumulation_steps),
            settings.epochs,
            settings.warmup_epochs,
            settings.freeze_epochs,
        )
        aux = target_matrix(data.table, settings.aux)
        network = torch.compile(state.model) if settings.compile else state.model
        compiled = torch.compile(state.evaluated) if settings.compile else None
        return cls(settings, data, fold, device, state, loaders, schedule, aux, network, compiled)

    @cached_property
    def _aux_on_device(self) -> Tensor | None:
        return torch.from_numpy(self.aux).to(self.device) if self.settings.aux else None

    def train_next_epoch(self) -> EpochStats:
        """Train the next epoch in all processes. Raise the errors of `train_epoch`."""
        epoch = self.state.epoch
        seed_epoch(self.settings.seed, self.fold, epoch, distributed.rank())
        self.loaders.sampler.epoch = epoch
        if self.forward is None or epoch == self.settings.freeze_epochs:
            # DistributedDataParallel lists the weights that need a gradient when it is created, so
            # it is created again when the backbone is thawed.
            self.state.model.backbone.requires_grad_(epoch >= self.settings.freeze_epochs)
            self.forward = distributed.wrap_ddp(self.network)
        stats = train_epoch(
            self.state,
            self.forward,
            self.loaders.training,
            self.schedule,
            self.settings,
            self.device,
            f"fold {self.fold}",
            self._aux_on_device,
        )
        self.state.epoch = epoch + 1
        return EpochStats.merge(distributed.gather(stats))

    def predict_held_out(self) -> Predictions | None:
        """Return the predictions that all processes make of held-out rows, None without any."""
        held_out = self.loaders.held_out_sampler
        held_out.takes_all = self.settings.validates_all(self.state.epoch)
        # Ranks differ in their batch statistics, and in the moving average of those.
        distributed.broadcast_weights(self.state.evaluated)
        if not held_out.num_rows:
            return None
        predictions = predict(
            self.state.evaluated,
            self.loaders.held_out,
            self.device,
            self.settings.precision,
            self.state.num_parts,
            self.compiled,
        )
        return Predictions.merge(distributed.gather(predictions))

    def validate(self, predictions: Predictions | None) -> Validation | None:
        """Return the scores of an epoch's predictions. Raise UserError if a logit is not finite."""
        if predictions is None:
            return None
        rows = predictions.rows
        scores = score(self.data.target[rows], predictions)
        scores |= target_scores(self.aux[rows], predictions.aux, self.settings.aux)
        return Validation(scores, len(rows), self.loaders.held_out_sampler.num_rows)

    def save(self, stats: EpochStats, predictions: Predictions | None) -> None:
        """Write the finished epoch's line of history and its checkpoints."""
        state, settings = self.state, self.settings
        directory = fold_dir(settings.run_dir, self.fold)
        validation = self.validate(predictions)
        if is_selected(state, settings, validation):
            save_fold(directory, state, settings, self.data, self.fold, predictions)
        rates = learning_rates(state.optimizer)
        log_epoch(directory, self.fold, state.epoch, settings.epochs, stats, validation, rates)
        # Last of all: a run that is killed before this point repeats the epoch.
        save_last(directory / LAST_CHECKPOINT, state, settings, self.data)


def start_or_resume(
    state: TrainState, settings: TrainSettings, data: TrainData, fold: Fold, device: torch.device
) -> None:
    """Load `last.pth` into `state` with --resume, set the threads and prepare the folder.

    Raises:
        UserError: `last.pth` does not fit this run, or its last epoch is already finished.
    """
    directory = fold_dir(settings.run_dir, fold)
    last = directory / LAST_CHECKPOINT
    resumes = distributed.broadcast_object(settings.resume and last.is_file())
    if resumes:
        restore(state, last, settings, data)
    if state.epoch == settings.epochs:
        raise UserError(
            f"{directory} has finished its last epoch, but results are missing; train it again "
            "with --force"
        )
    threads = set_threads(state.model, settings, device, state.num_threads)
    if threads and distributed.is_main():
        print(f"fold {fold}: {threads}", flush=True)
    begin_fold(settings, data, fold, resumes)
    if not resumes:
        # A run that is stopped in its first epoch can be resumed too.
        save_last(last, state, settings, data)


def is_selected(state: TrainState, settings: TrainSettings, validation: Validation | None) -> bool:
    """Return whether `best_model.pth` is to hold the finished epoch."""
    if validation is None:
        return state.epoch == settings.epochs
    return validation.is_complete and select_epoch(
        state, settings.select_epoch, settings.epochs, validation.scores["pauc"]
    )


def select_epoch(state: TrainState, mode: str, num_epochs: int, pauc: float) -> bool:
    """Update `state.best_pauc` and return whether the finished epoch is the one to keep.

    `mode` is `last` or `best`; `pauc` is that of all held-out rows.
    """
    if mode == "last":
        # Not the highest pAUC but the latest: after the last epoch, that of the saved weights.
        state.best_pauc = pauc
        return state.epoch == num_epochs
    is_best = pauc > state.best_pauc
    if is_best:
        state.best_pauc = pauc
    return is_best


def train_epoch(
    state: TrainState,
    forward: Any,
    loader: Iterable[Batch],
    schedule: Schedule,
    settings: TrainSettings,
    device: torch.device,
    title: str,
    aux: Tensor | None = None,
) -> EpochStats:
    """Train on every batch of an epoch, `settings.accumulation_steps` batches per optimizer step.

    Args:
        state: changed in place.
        forward: `state.model`, possibly compiled and wrapped.
        aux: auxiliary targets of all rows, on the device; None if the model has none.

    Raises:
        NonFiniteGradient: the run has diverged; in float32 and bfloat16 the weights are those
            before the step.
        UserError: a single image does not fit the device's memory.
    """
    state.model.train()
    # A frozen backbone keeps its batch statistics too.
    state.model.backbone.train(state.epoch >= settings.freeze_epochs)
    stats = EpochStats()
    started = time.perf_counter()
    batches = TimedLoader(loader)
    progress = tqdm(
        batches,
        desc=f"{title} epoch {state.epoch + 1}/{settings.epochs}",
        leave=False,
        disable=None if distributed.is_main() else True,  # None: hidden unless on a terminal
    )
    augment = create_device_augmentation(settings.augmentation, settings.augment_on, device)
    mix = create_mixup(settings.mixup, settings.cutmix)
    results: deque[StepResult] = deque()
    for micro_batches in batched(progress, settings.accumulation_steps):
        interrupt.raise_if_interrupted()
        set_lr(state.optimizer, schedule, state.step)
        on_device = [augment(to_device(batch, device)) for batch in micro_batches]
        mixed = [mix(with_aux(batch, aux)) for batch in on_device]
        loss = accumulate(state, forward, mixed, settings, device)
        values = optimizer_step(state, settings.clip_grad, loss)
        # With the batches before the copy to the device: reading row numbers there would sync.
        results.append(StepResult(state, micro_batches, values))
        stats.num_images += sum(len(batch.images) for batch in micro_batches)
        if len(results) > STEPS_AHEAD:
            stats.add(*results.popleft().read())
            show_progress(progress, stats, state.optimizer, time.perf_counter() - started)
    for result in results:
        stats.add(*result.read())
    # Reading the last results has waited for the device, so the time includes all steps.
    stats.seconds = time.perf_counter() - started
    stats.waiting = batches.seconds
    return stats


def show_progress(
    progress: "tqdm[Batch]", stats: EpochStats, optimizer: torch.optim.Optimizer, seconds: float
) -> None:
    """Set the loss, the head's learning rate and the speed that the progress bar shows."""
    progress.set_postfix(
        loss=stats.loss_text(last=50),
        lr=f"{optimizer.param_groups[-1]['lr']:.1e}",
        img_s=f"{stats.num_images / seconds:.0f}",
        refresh=False,
    )


_T = TypeVar("_T")


def batched(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Yield lists of `size` items, the last one shorter: itertools.batched of Python 3.12."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
