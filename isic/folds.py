"""Fold plans of training rows: stratified by target, no patient in two folds."""

import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from isic import schema
from isic.metadata import require, with_patient
from isic.runtime.errors import UserError, first_line
from isic.runtime.files import digest
from isic.tables import parquet_metadata, read_parquet, write_parquet


@dataclass(frozen=True)
class Folds:
    """A fold plan. Plans with equal digests are equal."""

    table: pl.DataFrame
    """`isic_id` String (sorted), `fold` Int8."""
    source: str = ""
    """The file that it was read from, for messages."""

    def __str__(self) -> str:
        return f"the fold plan {self.source or self.digest}"

    @property
    def num_folds(self) -> int:
        return int(self.table["fold"].max()) + 1  # type: ignore[arg-type]

    @cached_property
    def digest(self) -> str:
        return digest(*self.table["isic_id"], *self.table["fold"])

    def of(self, metadata: pl.DataFrame) -> pl.Series:
        """Return the fold of each row of `metadata`, Int8 in the table's order.

        Raises:
            UserError: a row is not in the plan, or a patient is in two folds.
        """
        fold = self.find(metadata)
        if fold.null_count():
            unknown = metadata.filter(fold.is_null())[schema.ID][0]
            raise UserError(
                f"{self} lacks {fold.null_count()} rows of this dataset, the first is {unknown}; "
                "it was made for other data: use that data, or another output folder"
            )
        patients = with_patient(metadata).select(schema.PATIENT, fold)
        num_folds = patients.group_by(schema.PATIENT).agg(pl.col("fold").n_unique())
        split = num_folds.filter(pl.col("fold") > 1)
        if len(split):
            patient = split[schema.PATIENT].sort()[0]
            raise UserError(
                f"{self} puts patient {patient} into two folds; use a plan made for this table"
            )
        return fold

    def find(self, metadata: pl.DataFrame) -> pl.Series:
        """Return the fold of each row of `metadata`, Int8 in its order, null if not in the plan."""
        rows = metadata.select(schema.ID)
        return rows.join(self.table, on=schema.ID, how="left", maintain_order="left")["fold"]

    def write(self, path: Path) -> None:
        write_parquet(path, self.table, {"digest": self.digest})


def read_folds(path: Path) -> Folds:
    """Read a fold plan. Raise UserError if it is missing, of one fold, edited, or not a plan."""
    table = _read(path, {schema.ID: pl.String(), "fold": pl.Int8()}, "fold plan")
    folds = Folds(table, str(path))
    written = parquet_metadata(path).get("digest")
    if written not in (None, folds.digest):
        raise UserError(f"{path} was changed after it was written; restore the original plan")
    present = table["fold"].unique().sort().to_list()
    if (
        not present
        or present != list(range(len(present)))
        or table[schema.ID].is_duplicated().any()
    ):
        raise UserError(
            f"{path} is not a fold plan: isic_ids must be unique and folds numbered 0, 1, 2 and so "
            "on; correct it"
        )
    if len(present) < 2:
        raise UserError(
            f"{path} has a single fold, which leaves no rows to train on; use a plan of two or "
            "more folds"
        )
    return folds


def _read(path: Path, columns: dict[str, pl.DataType], what: str) -> pl.DataFrame:
    """Read texts and whole numbers of a table, none of them blank. Raise UserError."""
    if not os.path.lexists(path):
        raise UserError(f"no {what} at {path}; run the step that makes it again")
    table = read_parquet(path)
    require(table, columns, f"{path} is not a {what}: it")
    table = table.select(*columns)
    # A cast to whole numbers would cut fractions off.
    if any((column % 1 != 0).any() for column in table if column.dtype.is_numeric()):
        raise UserError(f"{path} is not a {what}: it has numbers that are not whole; correct it")
    try:
        table = table.cast(columns)  # type: ignore[arg-type]
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{path} is not a {what} ({first_line(error)}); correct it") from None
    if sum(table.null_count().row(0)):
        raise UserError(f"{path} is not a {what}: it has blanks; correct it")
    return table


def draw_folds(metadata: pl.DataFrame, num_folds: int, seed: int) -> Folds:
    """Make a fold plan: stratified by target and grouped by patient.

    Args:
        metadata: `isic_id`, `target` and optionally `patient_id`.

    Raises:
        UserError: only one class, fewer patients with a positive or a negative row than folds, or
            a fold would have rows of one class only.
    """
    table = with_patient(metadata).sort(schema.ID)
    target = table[schema.TARGET].to_numpy()
    group = table[schema.PATIENT].to_numpy()
    if target.min() == target.max():
        raise UserError(
            f"every target is {target[0]}; training and scoring need rows of both classes"
        )
    for label, name in {1: "positive", 0: "negative"}.items():
        num_groups = len(np.unique(group[target == label]))
        if num_groups < num_folds:
            raise UserError(
                f"{num_groups} patients with a {name} row are too few for {num_folds} folds; "
                f"use --num_folds {max(num_groups, 2)} or more data"
            )
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    fold = np.zeros(len(table), dtype=np.int8)
    with warnings.catch_warnings():
        # "The least populated class ...": the loop above checked the counts by patient.
        warnings.simplefilter("ignore", UserWarning)
        for k, (_, held_out) in enumerate(splitter.split(target, target, group)):
            fold[held_out] = k
    _refuse_one_class(fold, target, num_folds, seed)
    return Folds(table.select(schema.ID, pl.Series("fold", fold)))


def _refuse_one_class(
    fold: NDArray[np.int8], target: NDArray[np.integer], num_folds: int, seed: int
) -> None:
    """Raise a UserError if the rows of a fold, [N] like their target, are of one class only."""
    # Rarely, in small tables: the splitter balances rows, and one patient may have many of them.
    for k in range(num_folds):
        present = np.unique(target[fold == k])
        if len(present) < 2:
            lacking = "negative" if 1 in present else "positive"
            raise UserError(
                f"the split of seed {seed} leaves fold {k} of {num_folds} without a {lacking} row; "
                "use another --split_seed, fewer folds or more data"
            )


def refuse_other_plan(path: Path, pinned: Path) -> None:
    """Raise a UserError if a run's plan, at `path`, is not that of its dataset, at `pinned`."""
    if is_other_plan(path, pinned):
        raise UserError(
            f"{pinned} is another fold plan than {path}, which this run began with; use another "
            "--name, delete the run's folder, or remove the dataset's plan"
        )


def is_other_plan(one: Path, two: Path) -> bool:
    """Return whether there are two fold plans and they differ."""
    # lexists: a broken link must be reported, not skipped.
    both = os.path.lexists(one) and os.path.lexists(two)
    return both and read_folds(one).digest != read_folds(two).digest


def folds_for(
    metadata: pl.DataFrame,
    num_folds: int,
    seed: int,
    path: Path,
    pinned: Path,
    seed_is_given: bool = False,
) -> Folds:
    """Return the plan at `path` (the run's), else at `pinned` (the dataset's), else a new one.

    Args:
        metadata: the whole training table; the plan is checked against it.
        seed_is_given: whether a plan that is there must be the one of the seed.

    Raises:
        UserError: both plans are there and differ, or the plan is for other data, another number of
            folds or another seed.
    """
    refuse_other_plan(path, pinned)
    # lexists: a broken link must be reported, not skipped.
    source = next((plan for plan in (path, pinned) if os.path.lexists(plan)), None)
    folds = read_folds(source) if source else draw_folds(metadata, num_folds, seed)
    if folds.num_folds != num_folds:
        other = "another output folder" if source == path else "remove the plan"
        raise UserError(
            f"{source} has {folds.num_folds} folds, not {num_folds}; "
            f"use --num_folds {folds.num_folds}, or {other}"
        )
    folds.of(metadata)
    if source and seed_is_given and folds.digest != draw_folds(metadata, num_folds, seed).digest:
        other = "use another output folder" if source == path else "remove the plan"
        raise UserError(
            f"{source} is not the plan of --split_seed {seed}; leave --split_seed out, or {other}"
        )
    return folds
