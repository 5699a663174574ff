"""`python -m train --config vit_tiny`: trains the folds of a config."""

import sys

from isic.runtime import cli
from isic.runtime.interrupt import Interrupted, interruptible
from train import distributed
from train.config import TrainSettings, load_settings
from train.data import load_data, worker_errors
from train.loop import train_fold
from train.machine import check_bfloat16, prepare, select_device
from train.outputs import is_finished, print_scores, refuse_other_content, refuse_to_lose
from train.pretrained import refuse_leaking_weights


def train(settings: TrainSettings) -> int:
    """Trains one fold or all of a config into <output_dir>/<name>/fold_<k>.

    --config (or --model_config) names a file in configs/ or a path; every key of it is a flag as well.
    """
    try:
        with interruptible(), distributed.process_group(select_device(settings.device)):
            train_folds(settings)
    except Interrupted as stop:
        if distributed.is_main():
            print(
                f"stopped by {stop}; the same command with --resume goes on from the last epoch",
                file=sys.stderr,
            )
        return stop.exit_code
    return 0


def train_folds(settings: TrainSettings) -> None:
    """Trains the folds that are due and prints the scores of all."""
    device = select_device(settings.device)
    if settings.bf16:
        check_bfloat16(device)
    folds = range(settings.num_folds) if settings.fold is None else [settings.fold]
    due = distributed.from_main(
        [fold for fold in folds if settings.force or not is_finished(settings, fold)]
    )
    if distributed.is_main():
        for fold in sorted(set(folds) - set(due)):
            print(f"fold {fold} is finished; --force trains it again")
    for fold in due:
        refuse_other_content(settings, fold)
        refuse_to_lose(settings, fold)
    if due:
        data = load_data(settings)
        refuse_leaking_weights(settings.pretrained, due, data.table, data.fold)
        prepare(device)
        with worker_errors():
            for fold in due:
                train_fold(settings, data, fold)
    if distributed.is_main():
        print_scores(settings)


if __name__ == "__main__":
    cli.run(train, load_settings)
