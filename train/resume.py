"""Guards: whether a run may skip, continue or overwrite a fold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isic.dataset import refuse_dataset
from isic.layout import (
    ALL,
    BEST_CHECKPOINT,
    CONFIG_FILE,
    ERRORS_FILE,
    HISTORY_FILE,
    LAST_CHECKPOINT,
    OOF_FILE,
    TRAINED_ON_FILE,
    Fold,
    fold_dir,
    fold_dirs,
)
from isic.runtime.config import build, read_yaml
from isic.runtime.errors import UserError
from isic.runtime.files import refuse_foreign
from train.config import TrainSettings
from train.history import last_epoch, read_history
from train.plots import ROC_FILE

FREE_TO_CHANGE = {
    "fold",
    "force",
    "resume",
    "max_hours",
    "num_threads",
    "num_workers",
    "cache",
    "device",
    "data",
    "output_dir",
    "on_error",
}
"""Settings that may change between a run and its continuation: they do not affect the weights."""


def is_finished(settings: TrainSettings, fold: Fold) -> bool:
    """Return whether the fold has its checkpoint, its scores (but ALL) and its last epoch.

    Raises:
        UserError: it is finished, but with other settings.
    """
    directory = fold_dir(settings.run_dir, fold)
    names = {OOF_FILE, BEST_CHECKPOINT, CONFIG_FILE, HISTORY_FILE}
    if fold == ALL:
        names.remove(OOF_FILE)
    if not all((directory / name).is_file() for name in names):
        return False
    config = directory / CONFIG_FILE
    saved = read_yaml(config)
    # A file of another program, or one that was edited.
    if not {"model", "epochs"} <= set(saved):
        raise UserError(
            f"{config} lacks model or epochs, which training writes; restore it, or train fold "
            f"{fold} again with --force"
        )
    if last_epoch(read_history(directory / HISTORY_FILE)) < saved["epochs"]:
        return False
    refuse_difference(directory, saved, settings)
    return True


def refuse_difference(path: Path, saved: Mapping[str, Any], settings: TrainSettings) -> None:
    """Raise a UserError that names the first setting in which `saved` differs from `settings`."""
    now = settings.model_dump(mode="json")
    # Settings that did not exist when the file was written have their defaults.
    then = build(TrainSettings, saved, source=str(path)).model_dump(mode="json")
    if settings.precision == "auto":
        now["precision"] = then["precision"]
    for key in sorted(now.keys() - FREE_TO_CHANGE):
        if now[key] != then[key]:
            raise UserError(
                f"{path} was made with {key}={then[key]}, now it is {now[key]}; use the previous "
                "value, choose another --name, or train again with --force"
            )


def keep_precision(settings: TrainSettings, fold: Fold) -> TrainSettings:
    """Return the settings with the precision of a fold that is continued in place of `auto`."""
    directory = fold_dir(settings.run_dir, fold)
    config = directory / CONFIG_FILE
    continues = settings.resume and (directory / LAST_CHECKPOINT).is_file() and config.is_file()
    if settings.precision != "auto" or not continues:
        return settings
    saved = build(TrainSettings, read_yaml(config), source=str(config))
    return settings.model_copy(update={"precision": saved.precision})


def require_resume_or_force(settings: TrainSettings, fold: Fold) -> None:
    """Raise a UserError if a partly trained fold would be restarted without --force."""
    directory = fold_dir(settings.run_dir, fold)
    history = directory / HISTORY_FILE
    resumes = settings.resume and (directory / LAST_CHECKPOINT).is_file()
    if settings.force or resumes or not history.is_file():
        return
    num_done = len(read_history(history))
    raise UserError(
        f"{directory} has {num_done} of {settings.epochs} epochs; continue with --resume, or start "
        "again with --force"
    )


def refuse_other_content(settings: TrainSettings, fold: Fold) -> None:
    """Raise a UserError if files that no training run wrote would be overwritten."""
    run = settings.run_dir
    directory = fold_dir(run, fold)
    flag = "--output_dir or --name"
    refuse_dataset(run, flag)
    names = (
        CONFIG_FILE,
        HISTORY_FILE,
        OOF_FILE,
        TRAINED_ON_FILE,
        BEST_CHECKPOINT,
        LAST_CHECKPOINT,
    )
    refuse_foreign((directory / name for name in names), _is_trained_fold(directory), flag)
    folders = {**fold_dirs(run), **fold_dirs(run, ALL)}
    is_run = any(_is_trained_fold(folder) for folder in folders.values())
    refuse_foreign((run / name for name in (ROC_FILE, ERRORS_FILE)), is_run, flag)


def _is_trained_fold(directory: Path) -> bool:
    path = directory / CONFIG_FILE
    return path.is_file() and {"model", "epochs", "split_seed"} <= set(read_yaml(path))
