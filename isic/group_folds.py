"""Fold plans that hold out all rows with one value of a column together, such as a hospital.

`python -m isic folds` writes one.
"""

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from isic import schema
from isic.arrays import codes
from isic.dataset import Dataset
from isic.folds import Folds, read_folds
from isic.metadata import clean_text, with_patient
from isic.runtime.errors import UserError, did_you_mean, first_of
from isic.settings import FoldsSettings

BLANK = "blank"
"""Name of the value of rows without one."""
SHOWN = 5
"""Values that a message names."""


def write_group_folds(settings: FoldsSettings) -> None:
    """Run `isic folds`, which its settings describe."""
    dataset = Dataset(settings.data)
    metadata = dataset.metadata("train")
    if settings.group not in metadata.columns:
        hint = did_you_mean(settings.group, metadata.columns)
        raise UserError(f'--group: the training table has no column "{settings.group}", {hint}')
    path = settings.output or dataset.folds_path
    folds = draw_group_folds(metadata, settings.group, settings.num_folds)
    _refuse_other_plan(path, folds)
    _print_folds(metadata, settings.group, folds)
    folds.write(path)
    print(f"fold plan: {path}")


def draw_group_folds(metadata: pl.DataFrame, column: str, num_folds: int) -> Folds:
    """Make a fold plan in which neither a value of the column nor a patient is in two folds.

    Values that share a patient are held out together. Rows without a value are one group. Groups
    are spread so that positives and rows are about equal; the result depends only on the rows.

    Raises:
        UserError: fewer groups, or groups with a positive row, than folds; a fold of one class.
    """
    table = with_patient(metadata).sort(schema.ID)
    group = _groups(table, column)
    target = table[schema.TARGET].to_numpy().astype(np.int64)
    rows = np.bincount(group)
    positives = np.bincount(group, target).astype(np.int64)
    counts = {"": len(rows), "a positive row and ": int((positives > 0).sum())}
    for kind, number in counts.items():
        if number < num_folds:
            raise UserError(
                f"{num_folds} folds need as many values of {column} with {kind}patients of their "
                f"own, there {'is' if number == 1 else 'are'} {number}; {_fewer(number)}"
            )
    fold = _spread(rows, positives, num_folds)[group]
    for k in range(num_folds):
        of_fold = target[fold == k]
        if of_fold.min() == of_fold.max():
            kind = "positive" if of_fold[0] else "negative"
            raise UserError(
                f"every row of a fold would be {kind}, with {num_folds} folds of {column}; "
                f"{_fewer(num_folds - 1)}"
            )
    return Folds(table.select(schema.ID, pl.Series("fold", fold.astype(np.int8))))


def _fewer(number: int) -> str:
    return f"use --num_folds {number}" if number > 1 else "choose another column"


def _values(table: pl.DataFrame, column: str) -> pl.Series:
    return clean_text(table[column], "the metadata").fill_null(BLANK)


def _groups(table: pl.DataFrame, column: str) -> NDArray[np.int64]:
    """Return [N] the number of each row's group: connected by patients and by values."""
    value = codes(_values(table, column))
    patient = codes(table[schema.PATIENT]) + value.max() + 1
    size = int(patient.max()) + 1
    edges = coo_array((np.ones(len(table), np.int8), (value, patient)), shape=(size, size))
    _, group = connected_components(edges, directed=False)
    return codes(pl.Series(group[value]))


def _spread(
    rows: NDArray[np.int64], positives: NDArray[np.int64], num_folds: int
) -> NDArray[np.int64]:
    """Return [G] the fold of each group.

    Args:
        rows, positives: [G].
    """
    # Groups with the most positives first, each to the fold that has least: the sum of the squared
    # shares of positives and of rows stays smallest.
    share = np.stack([positives / positives.sum(), rows / rows.sum()], axis=1)
    held = np.zeros((num_folds, 2))
    fold = np.zeros(len(rows), np.int64)
    for group in np.lexsort((-rows, -positives)):
        k = int((held @ share[group]).argmin())
        fold[group] = k
        held[k] += share[group]
    return fold


def _refuse_other_plan(path: Path, folds: Folds) -> None:
    """Raise a UserError if a file would be replaced that is not this plan."""
    # Models may have been trained on it.
    if not path.exists():
        return
    if path.is_file() and read_folds(path).digest == folds.digest:
        return
    raise UserError(f"{path} exists and is another plan; remove it or choose another --output")


def _print_folds(metadata: pl.DataFrame, column: str, folds: Folds) -> None:
    """Print each fold's rows, positives, patients and values, and which values are together."""
    table = with_patient(metadata).with_columns(folds.of(metadata), value=_values(metadata, column))
    by_fold = table.group_by("fold").agg(
        pl.len().alias("rows"),
        pl.col(schema.TARGET).sum().cast(pl.Int64).alias("positives"),
        pl.col(schema.PATIENT).n_unique().alias("patients"),
        pl.col("value").unique().sort(),
    )
    for k, rows, positives, patients, values in by_fold.sort("fold").iter_rows():
        print(
            f"fold {k}: {rows:,} rows, {positives:,} positive, {patients:,} patients, "
            f"{column} {first_of(values, SHOWN, '; ')}"
        )
    values_of = table.group_by(schema.PATIENT).agg(pl.col("value").unique().sort())
    shared = values_of.filter(pl.col("value").list.len() > 1).sort(schema.PATIENT)
    if len(shared):
        patient, values = shared.row(0)
        print(
            f"note: {len(shared):,} patient{'s' * (len(shared) > 1)} with several values of "
            f"{column}, which are held out together; the first is {patient} "
            f"({'; '.join(values[:SHOWN])})"
        )
