"""Train the folds of a config."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from isic import schema
from isic.layout import ALL, Fold, fold_dir
from isic.runtime.errors import UserError
from isic.runtime.interrupt import Interrupted, interruptible
from isic.runtime.only_writer import only_writer
from isic.runtime.progress import TimeLeft
from train import distributed
from train.augmentation.pipeline import check_augmentation
from train.config import TrainSettings
from train.deadline import OUT_OF_TIME, Deadline, OutOfTime
from train.loaders import worker_errors
from train.loop import train_fold
from train.machine import (
    check_bfloat16,
    prepare,
    resolve_choices,
    select_device,
    without_bfloat16,
)
from train.memory import memory_errors
from train.pretrained import refuse_leaking_weights
from train.resume import (
    CHOSEN,
    is_finished,
    keep_choices,
    refuse_changed_data,
    refuse_changed_weights,
    refuse_other_content,
    require_resume_or_force,
    warn_of_other_recipes,
)
from train.rows import TrainData, load_data
from train.step import NonFiniteGradient
from train.summary import print_scores, without_score
from train.targets import refuse_single_class


def train(settings: TrainSettings) -> int:
    """Train one fold or all of a config. Return the exit code."""
    device = select_device(settings.device)
    try:
        with interruptible(), distributed.process_group(device):
            return train_folds(settings, device)
    except Interrupted as signal:
        if distributed.is_main():
            print(
                f"stopped by {signal}; the same command with --resume continues after the last "
                "finished epoch",
                file=sys.stderr,
            )
        return signal.exit_code


def train_folds(settings: TrainSettings, device: torch.device) -> int:
    """Train the folds that are not finished and print the scores of all. Return the exit code."""
    deadline = Deadline(settings.max_hours)
    if settings.precision == "bf16":
        check_bfloat16(device)
    due = folds_to_train(settings)
    # All folds are checked before the first is trained, which may take hours.
    for fold in due:
        refuse_other_content(settings, fold)
        require_resume_or_force(settings, fold)
    runs = {fold: choose(settings, fold, device) for fold in due}
    if due:
        with_masks = settings.mask_weight > 0
        check_augmentation(settings.augmentation, settings.image_size, with_masks)
        data = load_data(settings)
        held_out = {fold: data.held_out(fold) for fold in due}
        refuse_leaking_weights(settings.pretrained, held_out)
        refuse_single_class(
            data.table, {fold: data.is_held_out(fold) for fold in due}, settings.aux
        )
        prepare(device)
        if distributed.is_main():
            announce_training(runs, data, device)
        try:
            with worker_errors(), memory_errors(device):
                train_each(runs, data, device, deadline)
        except NonFiniteGradient as error:
            raise UserError(error.describe(data.table[schema.ID])) from None
        except OutOfTime as stop:
            if distributed.is_main():
                print(stop.describe(settings, due), file=sys.stderr)
            return OUT_OF_TIME
    if distributed.is_main():
        if settings.fold == ALL:
            print(without_score(settings.run_dir))
        else:
            warn_of_other_recipes(settings.run_dir, settings.num_folds)
            print_scores(settings.run_dir, settings.num_folds)
    return 0


def train_each(
    runs: Mapping[Fold, TrainSettings], data: TrainData, device: torch.device, deadline: Deadline
) -> None:
    """Train a fold with each of some settings.

    Raises:
        NonFiniteGradient: a fold has diverged.
        OutOfTime: another epoch would exceed the deadline.
    """
    time_left = TimeLeft(sum(run.epochs for run in runs.values()), "training")
    for number, (fold, run) in enumerate(runs.items()):
        # The first epoch of a command is always made: without it, no command would get on.
        if number and not deadline.allows_epoch():
            raise OutOfTime(fold, 1)
        directory = fold_dir(run.run_dir, fold)
        with held_by_main(directory):
            train_fold(run, data, fold, device, deadline, time_left)


@contextmanager
def held_by_main(directory: Path) -> Iterator[None]:
    """Hold a folder against other commands, in the main process.

    Raises:
        UserError: another command holds it.
        SystemExit: likewise, in the other processes, which have nothing to add.
    """
    with ExitStack() as held:
        problem = None
        if distributed.is_main():
            try:
                held.enter_context(only_writer(directory))
            except UserError as error:
                problem = error
        if any(distributed.gather(problem is not None)):
            distributed.leave_together()
            raise problem or SystemExit(2)
        yield


def choose(settings: TrainSettings, fold: Fold, device: torch.device) -> TrainSettings:
    """Return the settings of a fold with choices, those of all processes, in place of `auto`.

    Raises:
        UserError: the fold is continued in a precision that the device does not compute in.
    """
    chosen = resolve_choices(keep_choices(settings, fold), device)
    chosen = distributed.broadcast_object(chosen)
    reason = without_bfloat16(device)
    if chosen.precision == "bf16" and reason:
        raise UserError(
            f"fold {fold} was begun in bf16; {reason}; continue on such a GPU, or start again "
            "with --force"
        )
    return settings.model_copy(update={key: getattr(chosen, key) for key in CHOSEN})


def announce_training(
    runs: Mapping[Fold, TrainSettings], data: TrainData, device: torch.device
) -> None:
    """Print one line on the training that is about to start.

    Args:
        runs: settings by fold, which differ in the precision only.
    """
    settings = next(iter(runs.values()))
    names = ", ".join(map(str, runs))
    precisions = " and ".join(sorted({run.precision for run in runs.values()}))
    print(
        f"training {settings.name}: {len(data.table):,} rows ({int(data.target.sum()):,} "
        f"malignant), fold{'s' * (len(runs) > 1)} {names}, {settings.epochs} epochs of "
        f"{settings.model} at {settings.image_size} px, {device.type} {precisions}",
        flush=True,
    )


def folds_to_train(settings: TrainSettings) -> list[Fold]:
    """Return the wanted folds without the finished ones, in all processes alike."""
    numbered: list[Fold] = list(range(settings.num_folds))
    folds = numbered if settings.fold is None else [settings.fold]
    finished = [fold for fold in folds if not settings.force and is_finished(settings, fold)]
    refuse_changed_data(settings, finished)
    refuse_changed_weights(settings, finished)
    if distributed.is_main():
        for fold in finished:
            print(f"fold {fold} is finished; --force trains it again")
    due = [fold for fold in folds if fold not in finished]
    # The main process decides: it may finish a fold before another process has looked at it.
    return distributed.broadcast_object(due)
