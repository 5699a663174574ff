"""The training rows of an ensemble: their table, fold plan and features."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.ensemble.boosting.checks import check_library
from infer.ensemble.boosting.thinning import ThinnedTables
from infer.ensemble.boosting.training_table import TrainingTable
from infer.ensemble.features.own_columns import OwnColumns, read_definitions, refuse_clashes
from infer.ensemble.features.own_tables import (
    IMPLAUSIBLE_AUC,
    IMPLAUSIBLE_OOF_AUC,
    OOF,
    OwnTable,
    read_train_tables,
    refuse_other_folds,
    warn_of_labels,
)
from infer.ensemble.features.spec import IMAGE_WORDS, FeatureSpec
from infer.ensemble.images.column_words import refuse_idle_words
from infer.ensemble.images.columns import ALIGNED
from infer.ensemble.images.features import EMBEDDED_FORMS, ImageRows, ImageState, fit_images
from infer.ensemble.lesions import patient_codes
from infer.ensemble.settings import NUM_FOLDS, FitSettings
from infer.ensemble.unused_flags import refuse_unused_flags
from isic import schema
from isic.dataset import Dataset
from isic.features.definitions import check_definitions, warn_of_untestable
from isic.folds import Folds, draw_folds, is_other_plan, read_folds
from isic.layout import FOLDS_FILE
from isic.metadata import require
from isic.runtime.errors import UserError, did_you_mean, warn
from isic.tables import read_names


@dataclass(frozen=True)
class FitRows:
    """The training rows of an ensemble, and the features that it is fitted on."""

    settings: FitSettings
    spec: FeatureSpec
    own_tables: Mapping[str, OwnTable]
    metadata: pl.DataFrame
    folds: Folds
    fold: pl.Series
    """[N]."""
    image: ImageState
    images: ImageRows
    names: tuple[str, ...]
    """The columns of the boosters' matrix; none if the networks' scores are the only features."""

    @property
    def target(self) -> NDArray[np.integer]:
        """[N]."""
        return self.metadata[schema.TARGET].to_numpy()

    @property
    def is_relative(self) -> bool:
        """Whether a score depends on the patient's other lesions."""
        return self.spec.compares_lesions(self.image)

    @property
    def num_boosters(self) -> int:
        settings = self.settings
        per_plan = len(settings.libraries) * self.folds.num_folds * settings.seeds
        return per_plan * settings.splits if self.names else 0

    @property
    def weights(self) -> dict[str, float]:
        return self.settings.library_weights if self.names else {"image": 1.0}

    @cached_property
    def table(self) -> TrainingTable:
        return self._table(self.metadata, self.images)

    @cached_property
    def thinned(self) -> ThinnedTables | None:
        share = self.settings.thin_patients
        return ThinnedTables(self.metadata, self.table_of, share) if share else None

    def table_of(self, metadata: pl.DataFrame) -> TrainingTable:
        """Return the table if the patients of the rows were those of `metadata`."""
        return self._table(metadata, self.images.with_patients(metadata))

    def _table(self, metadata: pl.DataFrame, images: ImageRows) -> TrainingTable:
        own_columns = [table.columns(metadata) for table in self.own_tables.values()]
        features = self.spec.frame(metadata, [*own_columns, *images.tables()])
        return TrainingTable(features, images.noisy(self.settings.image_noise))


def read_rows(settings: FitSettings) -> FitRows:
    """Read the training rows, and fit the state of their image features.

    Raises:
        UserError: the features, their files, the fold plan, the libraries or the settings do not
            fit each other.
    """
    spec, own_tables = read_spec(settings)
    refuse_unused_flags(settings, spec)
    _check_plan_only(settings, spec)
    if settings.refit and ALIGNED in spec.forms:
        raise UserError(
            f"--refit is not for {ALIGNED} columns, which only the networks of the folds have; "
            f"leave out {ALIGNED} or --refit"
        )
    metadata = read_train(settings.data, spec)
    folds = choose_folds(settings, metadata)
    fold = folds.of(metadata)
    refuse_other_folds(own_tables.values(), metadata, fold.to_numpy(), folds)
    image, images = fit_images(spec.forms, settings.embeddings, settings.frozen, metadata)
    refuse_idle_words(settings.features, spec.without_columns, image)
    names = spec.names(image)
    for library in settings.libraries if names else ():
        check_library(library, settings.parameters(library), names)
    rows = FitRows(settings, spec, own_tables, metadata, folds, fold, image, images, names)
    _refuse_contrary_settings(rows)
    return rows


def _check_plan_only(settings: FitSettings, spec: FeatureSpec) -> None:
    """Print that embeddings are read for their fold plan only, if they are.

    Raises:
        UserError: a flag of the command line gave them, and there is no plan beside them.
    """
    if not settings.embeddings or {*EMBEDDED_FORMS} & {*spec.forms}:
        return
    root = settings.embeddings[0]
    unused = f"--features {settings.features} reads no images of --embeddings"
    if os.path.lexists(root / FOLDS_FILE):
        print(f"note: {unused}, only the fold plan in {root}")
    elif "embeddings" in settings.given:  # a config file may serve several runs
        raise UserError(f"{unused}, and {root} has no fold plan ({FOLDS_FILE}); leave it out")


def _refuse_contrary_settings(rows: FitRows) -> None:
    """Raise a UserError if a setting is not for these features."""
    settings = rows.settings
    of_one_plan = {
        "the image features of fold models": rows.image.needs["embeddings"],
        "an oof table": any(table.spec.kind == OOF for table in rows.own_tables.values()),
    }
    refuse_splits(settings.splits, of_one_plan, find_folds(settings))
    if settings.thin_patients and not rows.is_relative:
        raise UserError(
            f"--thin_patients needs features relative to the patient, --features "
            f"{settings.features} has none; leave it out"
        )


def read_spec(settings: FitSettings) -> tuple[FeatureSpec, dict[str, OwnTable]]:
    """Return the requested features, and the tables of own columns by set. Raise UserError."""
    tables = read_train_tables(settings.tables)
    specs = {name: table.spec for name, table in tables.items()}
    own = OwnColumns(read_definitions(settings.define), specs)
    refuse_clashes(own, IMAGE_WORDS)
    return FeatureSpec.parse(settings.features, own), tables


def warn_of_own_columns(spec: FeatureSpec, table: pl.DataFrame, metadata: pl.DataFrame) -> None:
    """Warn of own columns that probably know the target."""
    target = metadata[schema.TARGET].to_numpy()
    fold = patient_codes(metadata) % NUM_FOLDS
    for word, names in spec.own.sets.items():
        is_oof = word in spec.own.tables and spec.own.tables[word].kind == OOF
        columns = table.select(name for name in names if name in spec.own_names)
        # Columns out of fold may be scores of whole models, which are better than measurements.
        limit = IMPLAUSIBLE_OOF_AUC if is_oof else IMPLAUSIBLE_AUC
        warn_of_labels(columns, target, fold, word, limit)


def refuse_unknown_blanks(names: Iterable[str], features: pl.DataFrame) -> None:
    """Raise a UserError if a column to blank is not a category among the boosters' features."""
    categories = [column.name for column in features if column.dtype == pl.String]
    for name in names:
        if name in categories:
            continue
        if name in features.columns:
            raise UserError(f"--blank: {name} is a number; name categories only")
        hint = did_you_mean(name, categories) if categories else "there are none"
        raise UserError(f'--blank: no category "{name}" among the features, {hint}')


def read_train(data: Path, spec: FeatureSpec) -> pl.DataFrame:
    """Read the training table, sorted by id so that the order of the file has no effect."""
    dataset = Dataset(data)
    metadata = dataset.metadata("train").sort(schema.ID)
    definitions, test = spec.own.all_definitions, dataset.metadata_path("test")
    check_definitions(definitions, metadata)
    if definitions and test.is_file():
        warn_of_untestable(definitions, spec.own_names, read_names(test), str(test))
    require(metadata, spec.needed_columns, dataset.metadata_path("train"))
    return metadata


def choose_folds(settings: FitSettings, metadata: pl.DataFrame) -> Folds:
    """Return the fold plan of the embeddings, else of the dataset, else a new one.

    Raises:
        UserError: the plan is for other rows, is not the dataset's, or contradicts the settings.
    """
    path = find_folds(settings)
    if path is None:
        return draw_folds(metadata, settings.num_folds or NUM_FOLDS, settings.seed_of_split)
    _compare_plans(settings.embeddings, settings.data / FOLDS_FILE)
    folds = read_folds(path)
    _refuse_contradiction(path, folds, metadata, settings.num_folds, settings.split_seed)
    return folds


def find_folds(settings: FitSettings) -> Path | None:
    """Return the file with the fold plan of the embeddings, else of the dataset; None for none."""
    for root in (*settings.embeddings[:1], settings.data):
        # lexists: a broken link must be reported when it is read, not skipped.
        if os.path.lexists(root / FOLDS_FILE):
            return root / FOLDS_FILE
    return None


def _compare_plans(embeddings: Sequence[Path], pinned: Path) -> None:
    """Compare the plans of networks with the dataset's, at `pinned`; warn of one after the first.

    Raises:
        UserError: the first network's plan, which is the boosters', is not the dataset's.
    """
    # Else a plan that holds out hospitals would seem to be in use when it is not.
    for number, root in enumerate(embeddings):
        path = root / FOLDS_FILE
        if not is_other_plan(path, pinned):
            continue
        if number == 0:
            raise UserError(
                f"{pinned} is another fold plan than {path}, which the boosters would use; name a "
                "network first that was trained on the dataset's plan, or remove that plan"
            )
        warn(
            f"{root} has another fold plan than {pinned}: the models that score a held-out row may "
            "have learned from the rows that the dataset's plan holds out with it"
        )


def _refuse_contradiction(
    path: Path,
    folds: Folds,
    metadata: pl.DataFrame,
    num_folds: int | None,
    split_seed: int | None,
) -> None:
    if num_folds not in (None, folds.num_folds):
        raise UserError(
            f"{path} has {folds.num_folds} folds, not {num_folds}; leave --num_folds out"
        )
    if split_seed is None:
        return
    if draw_folds(metadata, folds.num_folds, split_seed).digest != folds.digest:
        raise UserError(
            f"{path} is not the fold plan of --split_seed {split_seed}; leave --split_seed out"
        )


def refuse_splits(num_splits: int, of_one_plan: Mapping[str, bool], plan: Path | None) -> None:
    """Raise a UserError if several fold plans are asked for and there can be only one.

    Args:
        of_one_plan: kinds of features that are out of fold in one plan only; whether they are used.
        plan: the file with the fold plan, if it is not drawn.
    """
    if num_splits == 1:
        return
    used = [kind for kind, is_used in of_one_plan.items() if is_used]
    if used:
        raise UserError(
            f"{' and '.join(used)} can be out of fold in one fold plan only, and --splits draws "
            "others; leave --splits out, or leave these features out"
        )
    if plan:
        raise UserError(
            f"{plan} is the only fold plan of this fit, and --splits draws others; leave --splits "
            "out, or fit without that file"
        )
