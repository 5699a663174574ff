"""The facts about a patient that no training lesion prepared an ensemble for."""

from collections.abc import Iterable

import polars as pl

from infer.ensemble.blends.artifact import Scorer
from infer.ensemble.drift import ColumnSummary
from infer.ensemble.lesions import fewest_usual
from infer.triage.causes import WORDS

RANGED = ("age_approx", "clin_size_long_diam_mm")
"""Numbers whose range in training is checked. Among 34 numbers, some are often just outside."""


def unfamiliar(scorer: Scorer, metadata: pl.DataFrame) -> list[str]:
    """Return sentences on the properties of a patient's lesions that training did not have."""
    return [*_few_lesions(scorer, len(metadata)), *_columns(scorer, metadata)]


def _few_lesions(scorer: Scorer, number: int) -> list[str]:
    training = scorer.manifest["lesions_per_patient"]
    least = fewest_usual(training)
    if not scorer.is_relative or number >= least:
        return []
    return [
        f"Only {number:,} lesion{'s' if number > 1 else ''}: nearly all training patients have at "
        f"least {least:,}, and the score compares a lesion with the patient's others."
    ]


def _columns(scorer: Scorer, metadata: pl.DataFrame) -> Iterable[str]:
    for name, trained in scorer.training.items():
        if name not in metadata.columns:
            continue
        column = metadata[name].drop_nulls()
        if not trained.is_number:
            yield from _unseen(name, trained, column)
        elif name in RANGED:
            yield from _outside(name, trained, column)


def _unseen(name: str, trained: ColumnSummary, column: pl.Series) -> Iterable[str]:
    for value in column.unique().sort():
        if value not in trained.points:
            yield f"No training lesion has the {WORDS[name].noun} “{value}” ({name})."


def _outside(name: str, trained: ColumnSummary, column: pl.Series) -> Iterable[str]:
    assert trained.limits
    low, high = trained.limits
    outside = int(((column < low) | (column > high)).sum())
    if outside:
        words = WORDS[name]
        yield (
            f"{words.noun.capitalize()} of {outside:,} lesion{'s' if outside > 1 else ''} outside "
            f"the training range of {low:g} to {high:g} {words.unit}."
        )
