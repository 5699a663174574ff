"""Guards: whether a run may skip, continue or overwrite a fold."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from isic.dataset import Dataset, refuse_dataset
from isic.folds import refuse_other_plan
from isic.layout import (
    ALL,
    BEST_CHECKPOINT,
    CONFIG_FILE,
    ERRORS_FILE,
    FOLDS_FILE,
    HISTORY_FILE,
    LAST_CHECKPOINT,
    OOF_FILE,
    TRAINED_ON_FILE,
    Fold,
    fold_dir,
    fold_dirs,
)
from isic.runtime.config import build, read_yaml
from isic.runtime.errors import UserError, warn
from isic.runtime.fields import Fields, read_fields
from isic.runtime.files import digest, manifest_path, refuse_foreign, sha256
from train.config import TrainSettings
from train.history import last_epoch, read_history
from train.plots import ROC_FILE
from train.pretrained import existing_file
from train.rows import metadata_paths

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
CHOSEN = ("precision", "augment_on")
"""Settings that training chooses if they are `auto`; a fold keeps its own."""


class MadeFrom(Fields):
    """The digests of the training data in a fold's manifest; earlier versions wrote none."""

    metadata_sha256: str | None = None
    extra_sha256: list[str] = Field([])
    images_digest: str | None = None


class InitialWeights(Fields):
    """The initial weights in a fold's manifest: their source, and SHA-256 of file and tensors."""

    source: str = ""
    sha256: str | None = None
    tensors_sha256: str | None = None


class Constants(Fields):
    """The constants that a network normalises its input with."""

    mean: list[float] | None = None
    std: list[float] | None = None


class FoldManifest(Fields):
    """The fields of a fold's manifest that are compared."""

    made_from: MadeFrom = Field(default_factory=MadeFrom)
    pretrained: InitialWeights = Field(default_factory=InitialWeights)
    preprocess: Constants = Field(default_factory=Constants)

    @property
    def tables(self) -> list[str] | None:
        """The digests of the training tables; None if they are unknown."""
        first = self.made_from.metadata_sha256
        return None if first is None else [first, *self.made_from.extra_sha256]

    @property
    def known(self) -> dict[str, Any]:
        """The inputs that the fold was trained from, by name; unknown ones are left out."""
        weights = self.pretrained
        facts = {
            "training table": self.tables,
            "set of images": self.made_from.images_digest,
            # By source, because the folds may start from the same folds of another run.
            f"version of the weights {weights.source}": weights.sha256 or weights.tensors_sha256,
            **self.preprocess.model_dump(include={"mean", "std"}),
        }
        return {name: fact for name, fact in facts.items() if fact is not None}


def read_fold_manifest(directory: Path) -> FoldManifest:
    """Read the manifest of a fold's checkpoint; without one, everything is unknown."""
    path = manifest_path(directory / BEST_CHECKPOINT)
    if not path.is_file():
        return FoldManifest()
    return FoldManifest(**read_fields(path, FoldManifest, "train this fold again with --force"))


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
    if not (isinstance(saved.get("model"), str) and isinstance(saved.get("epochs"), int)):
        raise UserError(
            f"{config} lacks model or epochs, which training writes; restore it, or train fold "
            f"{fold} again with --force"
        )
    if last_epoch(read_history(directory / HISTORY_FILE)) < saved["epochs"]:
        return False
    refuse_difference(directory, saved, settings)
    return True


def refuse_difference(path: Path, saved: Mapping[str, Any], settings: TrainSettings) -> None:
    """Raise a UserError with the first setting in which `saved` differs, and flags to continue."""
    now = settings.model_dump(mode="json")
    then = saved_settings(path, saved).model_dump(mode="json")
    now.update({key: then[key] for key in CHOSEN if now[key] == "auto"})
    keys = [key for key in sorted(now.keys() - FREE_TO_CHANGE) if now[key] != then[key]]
    if keys:
        first = keys[0]
        raise UserError(
            f"{path} was made with {first}={in_short(then[first])}, now it is "
            f"{in_short(now[first])}; continue {with_flags({key: then[key] for key in keys})}, "
            "choose another --name, or train again with --force"
        )


def with_flags(saved: Mapping[str, Any]) -> str:
    """Return the flags that give settings their saved values: "with --lr 0.1, without --aux"."""
    given = [as_flag(key, value) for key, value in saved.items() if value not in (None, [])]
    absent = [f"--{key}" for key, value in saved.items() if value in (None, [])]
    parts = {"with": given, "without": absent}
    return ", ".join(f"{word} {' '.join(flags)}" for word, flags in parts.items() if flags)


def as_flag(key: str, value: Any) -> str:
    """Return the flag that gives a setting its saved value, as far as a flag can."""
    match value:
        case dict():  # the content of a file
            return f"the earlier --{key}"
        case bool():
            return f"--{key} {str(value).lower()}"
        case list():
            return f"--{key} {shlex.quote(','.join(value))}"
    return f"--{key} {shlex.quote(str(value))}"


def warn_of_other_recipes(run: Path, num_folds: int) -> None:
    """Warn of folds with scores that were trained with other settings or inputs than the first."""
    recipes = {}
    for fold in range(num_folds):
        directory = fold_dir(run, fold)
        config = directory / CONFIG_FILE
        if (directory / OOF_FILE).is_file() and config.is_file():
            saved = saved_settings(config, read_yaml(config)).model_dump(mode="json")
            recipe = {key: saved[key] for key in saved.keys() - FREE_TO_CHANGE - {*CHOSEN}}
            recipes[fold] = recipe | read_fold_manifest(directory).known
    first, *others = recipes or [0]
    for fold in others:
        recipe, other = recipes[fold], recipes[first]
        keys = sorted(key for key in recipe.keys() & other.keys() if recipe[key] != other[key])
        if keys:
            warn(
                f"fold_{fold} was trained with another {', '.join(keys)} than fold_{first}, so "
                "mean and pooled scores are not those of one recipe; train them alike"
            )


def refuse_changed_data(settings: TrainSettings, folds: Sequence[Fold]) -> None:
    """Raise a UserError if plan or tables have changed since a finished fold was trained."""
    has_data = all(root.is_dir() for root in (settings.data, *settings.extra_data))
    paths = metadata_paths(settings) if has_data else []
    # The scores of a run are shown without its dataset too.
    if not (folds and paths and all(path.is_file() for path in paths)):
        return
    refuse_other_plan(settings.run_dir / FOLDS_FILE, Dataset(settings.data).folds_path)
    digests = [sha256(path) for path in paths]
    for fold in folds:
        directory = fold_dir(settings.run_dir, fold)
        refuse_changed_files(directory, read_fold_manifest(directory).tables, paths, digests)


def refuse_changed_weights(settings: TrainSettings, folds: Sequence[Fold]) -> None:
    """Raise a UserError if a file of initial weights has changed since a fold was trained."""
    for fold in folds:
        directory = fold_dir(settings.run_dir, fold)
        then = read_fold_manifest(directory).pretrained.sha256
        path = existing_file(settings.pretrained, fold)
        if then and path:
            refuse_changed_files(directory, [then], [path], [sha256(path)])


def refuse_changed_files(
    trained: Path, then: Sequence[str] | None, paths: Sequence[Path], now: Sequence[str]
) -> None:
    """Raise a UserError that names the first input file that has changed.

    Args:
        trained: a fold's folder or its `last.pth`.
        then: digests of the files that it was trained from; None in files of earlier versions.
        paths, now: the files and their digests.
    """
    for path, before, digest_now in zip(paths, then or now, now, strict=False):
        if before != digest_now:
            raise UserError(
                f"{path} has changed since {trained} was trained; restore that file, or train "
                "this fold again with --force"
            )


def in_short(value: Any) -> Any:
    """Return a value as an error shows it; of a file's content the digest."""
    if not isinstance(value, dict):
        return value
    return f"a file of digest {digest(json.dumps(value, sort_keys=True))[:8]}"


def keep_choices(settings: TrainSettings, fold: Fold) -> TrainSettings:
    """Return the settings with those of a fold that is continued in place of `auto`."""
    directory = fold_dir(settings.run_dir, fold)
    config = directory / CONFIG_FILE
    continues = settings.resume and (directory / LAST_CHECKPOINT).is_file() and config.is_file()
    if not continues:
        return settings
    saved = saved_settings(config, read_yaml(config)).model_dump()
    chosen = {key: saved[key] for key in CHOSEN if getattr(settings, key) == "auto"}
    return settings.model_copy(update=chosen)


def saved_settings(path: Path, values: Mapping[str, Any]) -> TrainSettings:
    """Return the settings that a run has saved in a file; those it lacks have their defaults."""
    # Before `augment_on`, images were augmented in the workers.
    return build(TrainSettings, {"augment_on": "workers", **values}, source=str(path))


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
