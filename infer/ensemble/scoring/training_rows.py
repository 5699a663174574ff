"""The patients of the rows that ensembles were fitted on, from the dataset of the fit."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from infer.ensemble.artifact import Ensemble
from infer.ensemble.blends.artifact import Scorer, ensembles_of
from infer.ensemble.drift import ColumnSummary, Summary, summarise_table
from isic import schema
from isic.dataset import Dataset
from isic.metadata import with_patient
from isic.runtime.errors import UserError, first_of, warn
from isic.runtime.files import sha256

MAX_NAMED = 5
"""Columns that a warning names."""


def patients_of(
    scorers: Sequence[Scorer], oof: pl.DataFrame, dataset: Dataset, metadata: pl.DataFrame
) -> pl.Series:
    """Return [N] the patient of each scored row, the row's id if the patient is unknown.

    Warns if patients or measurements are others than in the fit.

    Args:
        scorers: ensembles that were fitted on the rows.
        oof: [N] `isic_id`, `fold` and `target` of the rows.
        metadata: the dataset's training table.

    Raises:
        UserError: the dataset lacks rows, has other targets, or a patient in two folds.
    """
    table = with_patient(metadata)
    rows = oof.select(schema.ID).join(table, on=schema.ID, how="left", maintain_order="left")
    problem = _lacking(rows) or _other_targets(rows, oof) or _split_patient(rows, oof)
    if problem:
        raise UserError(
            f"{dataset.root} {problem}; give the --data that {scorers[0].root} was fitted on"
        )
    digest = sha256(dataset.metadata_path("train"))
    for ensemble in (each for scorer in scorers for each in ensembles_of(scorer)):
        # The same table as another type of file has another digest.
        if ensemble.manifest["metadata_sha256"] != digest:
            _warn_of_other_values(ensemble, dataset, rows)
    return rows[schema.PATIENT]


def _warn_of_other_values(ensemble: Ensemble, dataset: Dataset, rows: pl.DataFrame) -> None:
    others = _other_columns(ensemble.training, rows)
    if others:
        warn(
            f"{dataset.root} has other values than the training table of {ensemble.root} in "
            f"{first_of(others, MAX_NAMED)}; give the --data that it was fitted on"
        )


def _lacking(rows: pl.DataFrame) -> str | None:
    number = rows[schema.PATIENT].null_count()
    return f"lacks {number} of the scored rows" if number else None


def _other_targets(rows: pl.DataFrame, oof: pl.DataFrame) -> str | None:
    number = int((rows[schema.TARGET] != oof[schema.TARGET]).sum())
    return f"has another target for {number} of the scored rows" if number else None


def _split_patient(rows: pl.DataFrame, oof: pl.DataFrame) -> str | None:
    folds = rows.select(schema.PATIENT, oof["fold"]).group_by(schema.PATIENT).n_unique()
    split = folds.filter(pl.col("fold") > 1)[schema.PATIENT].sort()
    return f"has patient {split[0]} in two folds of the fit" if len(split) else None


def _other_columns(trained: Summary, rows: pl.DataFrame) -> list[str]:
    """Return the raw columns whose values are others than in training, or else the patient's."""
    raw = [name for name in trained if name in (*schema.NUMERIC, *schema.CATEGORICAL)]
    now = summarise_table(rows, [name for name in raw if name in rows.columns])
    others = [name for name in raw if name not in now or not _alike(now[name], trained[name])]
    if others:
        return others
    alike = all(_alike_within_patients(now[name], trained[name]) for name in raw)
    return [] if alike else [schema.PATIENT]


def _alike(one: ColumnSummary, two: ColumnSummary) -> bool:
    """Return whether two columns may have the same values."""
    return (
        (one.points, one.limits) == (two.points, two.limits)
        and np.allclose(one.shares.share, two.shares.share)
        and np.allclose(one.blank.share, two.blank.share)
    )


def _alike_within_patients(one: ColumnSummary, two: ColumnSummary) -> bool:
    """Return whether two columns of the same values may be of the same patients."""
    return all(
        mine.squares == other.squares and np.allclose(mine.rho, other.rho)
        for mine, other in ((one.shares, two.shares), (one.blank, two.blank))
    )
