"""The patients of a triage, and their lesions in the order in which to look at them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.triage.experience import unfamiliar
from infer.triage.rows import ScoredRows
from isic import schema
from isic.metadata import with_patient
from isic.metrics import TOP_K
from isic.runtime.errors import UserError


@dataclass(frozen=True, eq=False)
class Patient:
    """A patient's n lesions, the one with the highest score first."""

    name: str
    index: NDArray[np.int64]
    """[n] places among all rows."""
    metadata: pl.DataFrame
    score: NDArray[np.float64]
    """[n]."""
    rank: NDArray[np.int64]
    """[n] places among the scores of all rows, 1 for the highest."""
    unfamiliar: list[str]
    """Sentences on the properties that no training lesion has."""
    scored_by: tuple[str, ...] = ()
    """The only members of a blend that score the patient, who has few lesions; empty for all."""

    @property
    def num_first(self) -> int:
        """The number of lesions to look at first."""
        return min(TOP_K, len(self.index))

    @property
    def names(self) -> list[str]:
        return self.metadata[schema.ID].to_list()


def choose_patients(rows: ScoredRows, names: Sequence[str], most: int) -> list[Patient]:
    """Return the named patients, or those with the highest scores, by falling highest score.

    Raises:
        UserError: a patient has no row.
    """
    table = with_patient(rows.metadata).select(
        schema.PATIENT, pl.Series("score", rows.score), pl.int_range(pl.len()).alias("row")
    )
    grouped = (
        table.sort(["score", "row"], descending=[True, False])
        .group_by(schema.PATIENT, maintain_order=True)
        .agg(pl.col("row"))
    )
    known = set(grouped[schema.PATIENT])
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(
            f"no {rows.split} row is of patient {missing[0]}; correct --patient, --split or --data"
        )
    if names:
        grouped = grouped.filter(pl.col(schema.PATIENT).is_in(list(names)))
    ranked = np.sort(rows.score)
    return [
        _patient(rows, name, np.asarray(index), ranked)
        for name, index in grouped.head(len(names) or most).iter_rows()
    ]


def _patient(
    rows: ScoredRows, name: str, index: NDArray[np.int64], ranked: NDArray[np.float64]
) -> Patient:
    score = rows.score[index]
    metadata = rows.metadata[index]
    rank = len(ranked) - np.searchsorted(ranked, score, side="right") + 1
    of_patient = rows.of_row(index[0])
    unlike = unfamiliar(of_patient.scorer, metadata)
    weights = {} if of_patient is rows else of_patient.scorer.weights
    scored_by = tuple(member for member, weight in weights.items() if weight)
    return Patient(name, index, metadata, score, rank, unlike, scored_by)
