"""The reasons for a lesion's score, each confirmed by scoring the lesion without it.

The boosters' contributions say which properties of a lesion raise its score. Those that raise it
most are tried: the lesion is scored again as if it were ordinary in that property, like its
patient's other lesions. Only properties without which the score falls become reasons.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.ensemble.drift import Summary
from infer.triage.causes import UNUSUAL, Cause
from infer.triage.rows import Contributions, ScoredRows
from infer.triage.sentences import PatientFacts, describe, middle_of, others_of
from isic import schema
from isic.arrays import Floats
from isic.runtime.errors import UserError

NUM_TRIED = 6
"""Properties per lesion that are tried, those with the largest contributions."""
NUM_REASONS = 4
SMALLEST_FALL = 0.1
"""Share of its odds, score / (1 - score), that a lesion must lose without a property."""
ROUNDING = 1e-6
"""Largest difference of two computations of a score."""
MOST_ROWS = 50_000
"""Rows whose features are computed together, to bound memory."""

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Reason:
    """A property that raises a lesion's score."""

    cause: str
    text: str
    score_without: float
    """The score of the lesion if it were ordinary in this property."""


@dataclass(frozen=True)
class Change:
    """A lesion made ordinary in one property."""

    place: int
    """The lesion among its patient's."""
    cause: Cause


@dataclass(frozen=True, eq=False)
class PatientRows:
    """The n rows of a patient."""

    rows: ScoredRows
    index: Places
    """[n] their places among all rows."""
    training: Summary

    @property
    def metadata(self) -> pl.DataFrame:
        return self.rows.metadata[self.index]

    @property
    def score(self) -> Floats:
        return self.rows.score[self.index]

    @property
    def folds(self) -> list[int] | None:
        return self.rows.folds_of(int(self.index[0]))


def find_reasons(patient: PatientRows, places: Sequence[int]) -> list[list[Reason]]:
    """Return the reasons for the scores of some of a patient's lesions, the strongest first.

    Args:
        places: of the lesions among the patient's.

    Raises:
        UserError: the models do not give the rows their scores.
    """
    tables = _tables(patient, patient.metadata, np.arange(len(patient.index)))
    chosen = {name: table[list(places)] for name, table in tables.items()}
    _refuse_other_scores(patient, places, patient.rows.rescore(chosen, patient.folds))
    found = patient.rows.contributions(chosen, patient.folds)
    tried = [
        [Change(place, cause) for cause in _most(found, row, len(patient.index))]
        for row, place in enumerate(places)
    ]
    without = iter(score_changed(patient, [change for part in tried for change in part]))
    return [
        _reasons(patient, found, row, [(change, next(without)) for change in changes])
        for row, changes in enumerate(tried)
    ]


def _most(found: Contributions, row: int, num_lesions: int) -> list[Cause]:
    """Return the causes that raise a row's score most."""
    # A single lesion is unlike no other one.
    possible = [cause for cause in found.causes if cause is not UNUSUAL or num_lesions > 1]
    ordered = sorted(possible, key=lambda cause: -found.causes[cause][row])
    return [cause for cause in ordered if found.causes[cause][row] > 0][:NUM_TRIED]


def _refuse_other_scores(patient: PatientRows, places: Sequence[int], score: Floats) -> None:
    """Raise a UserError if the models give other scores than those to explain."""
    if np.allclose(score, patient.score[list(places)], rtol=0, atol=ROUNDING):
        return
    raise UserError(
        f"the scores of patient {patient.metadata[schema.PATIENT][0]} are not those of the fit; "
        "give the same --data, --embeddings and --tables as to infer fit"
    )


def _reasons(
    patient: PatientRows, found: Contributions, row: int, tried: Sequence[tuple[Change, float]]
) -> list[Reason]:
    reasons = []
    for change, without in tried:
        if odds(without) < odds(patient.score[change.place]) * (1 - SMALLEST_FALL):
            columns = {name: values[row] for name, values in found.columns.items()}
            text = describe(_facts(patient), change.place, change.cause, columns)
            reasons.append(Reason(change.cause.name, text, float(without)))
    return sorted(reasons, key=lambda reason: reason.score_without)[:NUM_REASONS]


def _facts(patient: PatientRows) -> PatientFacts:
    given = [member.given[patient.index] for member in patient.rows.members.values()]
    columns = {column.name: column for table in (*given, patient.metadata) for column in table}
    return PatientFacts(columns, patient.training)


def odds(score: float) -> float:
    return score / max(1 - score, np.finfo(float).eps)


def score_changed(patient: PatientRows, changes: Sequence[Change]) -> list[float]:
    """Return the score of each changed lesion among its patient's other lesions."""
    num_each = len(patient.index) if patient.rows.scorer.is_relative else 1
    step = max(MOST_ROWS // num_each, 1)
    found: list[float] = []
    for start in range(0, len(changes), step):
        found += _score_changed(patient, changes[start : start + step])
    return found


def _score_changed(patient: PatientRows, changes: Sequence[Change]) -> list[float]:
    copies = [_changed_rows(patient, change, number) for number, change in enumerate(changes)]
    sizes = [len(copy.index) for copy in copies]
    metadata = pl.concat(copy.metadata for copy in copies)
    index = np.concatenate([copy.index for copy in copies])
    at = np.cumsum([0, *sizes[:-1]]) + [copy.at for copy in copies]
    tables = _tables(patient, metadata, index)
    changed = {
        name: _with_given_changes(patient, name, table[at], changes)
        for name, table in tables.items()
    }
    return list(map(float, patient.rows.rescore(changed, patient.folds)))


@dataclass(frozen=True, eq=False)
class _Copy:
    """A patient's rows with one changed lesion."""

    metadata: pl.DataFrame
    index: Places
    """[n] places of the rows among the patient's."""
    at: int
    """Place of the changed row in the copy."""


def _changed_rows(patient: PatientRows, change: Change, number: int) -> _Copy:
    """Return a patient's rows, under a name of their own, with a lesion made ordinary."""
    rows = patient.metadata.with_columns(pl.lit(str(number)).alias(schema.PATIENT))
    is_changed = pl.int_range(len(rows)) == change.place
    if change.cause.of_patient:
        is_changed = pl.lit(True)
    ordinary = _ordinary(patient, change)
    rows = rows.with_columns(
        pl.when(is_changed)
        .then(pl.lit(value, dtype=rows.schema[name]))
        .otherwise(pl.col(name))
        .alias(name)
        for name, value in ordinary.items()
    )
    if patient.rows.scorer.is_relative:
        return _Copy(rows, np.arange(len(rows)), change.place)
    return _Copy(rows[[change.place]], np.array([change.place]), 0)


def _ordinary(patient: PatientRows, change: Change) -> dict[str, Any]:
    """Return the ordinary values of a cause's columns: medians, and commonest categories.

    Those of the patient's other lesions, or, if there are none, of the training rows.
    """
    columns = [name for name in change.cause.columns if name in patient.metadata.columns]
    others = patient.metadata.filter(pl.int_range(pl.len()) != change.place).select(columns)
    if change.cause.of_patient or others.is_empty():
        trained = patient.training
        return {name: trained[name].middle if name in trained else None for name in columns}
    texts = others.select(pl.col(pl.String))
    numbers = {name: others[name].median() for name in columns if name not in texts.columns}
    # Categories of one lesion together: a site and a location by themselves may contradict.
    return numbers | (most_common(texts) if texts.width else {})


def most_common(rows: pl.DataFrame) -> dict[str, Any]:
    """Return the combination of values that most rows have, the first one if several do."""
    counts = rows.group_by(pl.all(), maintain_order=True).len("count")
    return (
        counts.sort("count", descending=True, maintain_order=True).drop("count").row(0, named=True)
    )


def _tables(
    patient: PatientRows, metadata: pl.DataFrame, places: Places
) -> dict[str, pl.DataFrame]:
    """Return feature tables by member of rows whose images are those of a patient's places."""
    index = patient.index[places]
    return {
        name: member.features(metadata, member.given[index])
        for name, member in patient.rows.members.items()
    }


def _with_given_changes(
    patient: PatientRows, name: str, table: pl.DataFrame, changes: Sequence[Change]
) -> pl.DataFrame:
    """Return a member's feature table [J] with the features that are changed themselves."""
    given = patient.rows.members[name].given
    columns = {feature for change in changes for feature in change.cause.features}
    for feature in sorted(columns & {*given.columns}):
        values = table[feature].to_list()
        own = given[feature][patient.index]
        for row, change in enumerate(changes):
            if feature in change.cause.features:
                others = others_of(own, change.place)
                values[row] = middle_of(others) if len(others) else None
        table = table.with_columns(pl.Series(feature, values, table.schema[feature]))
    return table
