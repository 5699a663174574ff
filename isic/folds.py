"""Which fold each training row is held out in: stratified by target, no patient in two folds."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from sklearn.model_selection import StratifiedGroupKFold

from isic import schema
from isic.errors import UserError
from isic.files import digest, write_parquet
from isic.metadata import with_patient

FILE = "folds.parquet"


@dataclass(frozen=True)
class Folds:
    """A fold plan. Two plans are the same exactly where their digests are."""

    table: pl.DataFrame
    """`isic_id` String (sorted), `fold` Int8."""

    @property
    def num_folds(self) -> int:
        return int(self.table["fold"].max()) + 1  # type: ignore[arg-type]

    @property
    def digest(self) -> str:
        return digest(*self.table["isic_id"], *self.table["fold"])

    def of(self, metadata: pl.DataFrame) -> pl.Series:
        """Returns the fold of each row of `metadata`, Int8 in the table's order.

        Raises:
            UserError: a row is not in the plan, or a patient stands in two folds.
        """
        fold = metadata.select(schema.ID).join(
            self.table, on=schema.ID, how="left", maintain_order="left"
        )["fold"]
        if fold.null_count():
            unknown = metadata.filter(fold.is_null())[schema.ID][0]
            raise UserError(
                f"the fold plan {self.digest} lacks {fold.null_count()} rows of this dataset, the first is {unknown}; "
                "it was made for other data: use that data, or another output folder"
            )
        patients = with_patient(metadata).select(schema.PATIENT, fold)
        split = (
            patients.group_by(schema.PATIENT)
            .agg(pl.col("fold").n_unique())
            .filter(pl.col("fold") > 1)
        )
        if len(split):
            raise UserError(
                f"the fold plan {self.digest} puts patient {split[schema.PATIENT][0]} into two folds; delete it"
            )
        return fold

    def write(self, path: Path) -> None:
        write_parquet(path, self.table, {"digest": self.digest})


def read_folds(path: Path) -> Folds:
    """Reads a fold plan. Raises UserError where it is missing, not a plan, or changed since it was written."""
    table = _read(path, {schema.ID: pl.String(), "fold": pl.Int8()}, "fold plan")
    folds = Folds(table)
    written = pl.read_parquet_metadata(path).get("digest")
    if written not in (None, folds.digest):
        raise UserError(
            f"{path} was changed after it was written; delete it and draw the folds again"
        )
    present = table["fold"].unique().sort().to_list()
    if (
        not present
        or present != list(range(len(present)))
        or table[schema.ID].is_duplicated().any()
    ):
        raise UserError(
            f"{path} is not a fold plan: every row needs an isic_id of its own, and the folds are 0, 1, 2 and so on; "
            "mend it, or delete it"
        )
    return folds


def _read(path: Path, columns: dict[str, pl.DataType], what: str) -> pl.DataFrame:
    """Reads the columns of a table, none of them blank. Raises UserError."""
    if not path.is_file():
        raise UserError(f"no {what} at {path}; run the step that makes it again")
    try:
        table = pl.read_parquet(path, columns=list(columns)).cast(columns)  # type: ignore[arg-type]
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"{path} is not a {what} ({str(error).splitlines()[0]}); delete it"
        ) from None
    if sum(table.null_count().row(0)):
        raise UserError(f"{path} is not a {what}: it has blanks; mend it, or delete it")
    return table


def draw_folds(metadata: pl.DataFrame, num_folds: int, seed: int) -> Folds:
    """Draws a fold plan: stratified by target and grouped by patient.

    Args:
        metadata: with `isic_id` and `target`; a row without `patient_id` is its own group.

    Raises:
        UserError: one class only, or fewer groups with a positive (or of all) than folds.
    """
    table = with_patient(metadata).sort(schema.ID)
    target = table[schema.TARGET].to_numpy()
    group = table[schema.PATIENT].to_numpy()
    if target.min() == target.max():
        raise UserError(
            f"every target is {target[0]}; training and scoring need rows of both classes"
        )
    for label, name in ((1, "positive"), (0, "negative")):
        num_groups = len(np.unique(group[target == label]))
        if num_groups < num_folds:
            raise UserError(
                f"{num_groups} patients with a {name} row are too few for {num_folds} folds; "
                f"use --num_folds {max(num_groups, 2)} or more data"
            )
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    fold = np.zeros(len(table), dtype=np.int8)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # "least populated class": counted by group above
        for k, (_, held_out) in enumerate(splitter.split(target, target, group)):
            fold[held_out] = k
    return Folds(table.select(schema.ID, pl.Series("fold", fold)))


def folds_for(metadata: pl.DataFrame, num_folds: int, seed: int, path: Path, pinned: Path) -> Folds:
    """Returns the plan of a run, checked against `metadata`: the one it began with, else the dataset's, else a draw.

    Args:
        metadata: the whole training table.
        path: the run's own plan, where it has one already.
        pinned: a plan that lies with the dataset; it wins over drawing one.

    Raises:
        UserError: the plan is for other data or another number of folds.
    """
    source = next((candidate for candidate in (path, pinned) if candidate.is_file()), None)
    folds = read_folds(source) if source else draw_folds(metadata, num_folds, seed)
    if folds.num_folds != num_folds:
        raise UserError(
            f"{source} has {folds.num_folds} folds, not {num_folds}; use --num_folds {folds.num_folds}, "
            "or another output folder"
        )
    folds.of(metadata)
    return folds
