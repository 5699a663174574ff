"""Sentences on a property of a lesion, compared with its patient's others or training lesions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from infer.ensemble.drift import Summary
from infer.triage.causes import UNUSUAL, WORDS, Cause, Words, score_of
from isic.html.page import percent

MIN_COMPARED = 2
"""Other lesions of a patient without which deviations say nothing."""
NOTABLE = 1.0
"""Standard deviations from the patient's other lesions that are worth a sentence."""
NUM_NAMED = 3


@dataclass(frozen=True)
class PatientFacts:
    """The columns of a patient's n lesions."""

    columns: Mapping[str, pl.Series]
    """[n] each, of the metadata and of given features."""
    training: Summary


def others_of(column: pl.Series, place: int) -> pl.Series:
    """Return the values of a patient's other lesions, without blanks."""
    return column.filter(pl.Series(np.arange(len(column)) != place)).drop_nulls()


def middle_of(values: pl.Series) -> Any:
    """Return the median, or the commonest value of a category."""
    return values.median() if values.dtype.is_numeric() else values.mode().sort()[0]


def describe(
    facts: PatientFacts, place: int, cause: Cause, contributions: Mapping[str, float]
) -> str:
    """Return a sentence on a property of a lesion.

    Args:
        place: of the lesion among the patient's.
        contributions: of each metadata column to the score.
    """
    if cause is UNUSUAL:
        return _unusual(facts, place)
    if cause.features:
        return _given(facts, place, cause)
    known = [name for name in cause.columns if _value(facts, name, place) is not None]
    if not known:
        return f"{cause.name}: not recorded"
    name = max(known, key=lambda name: contributions.get(name, 0.0))
    return _column(facts, place, name, cause.of_patient)


def _value(facts: PatientFacts, name: str, place: int) -> Any:
    return facts.columns[name][place] if name in facts.columns else None


def _column(facts: PatientFacts, place: int, name: str, of_patient: bool) -> str:
    words, value = WORDS[name], _value(facts, name, place)
    trained = facts.training.get(name)
    if isinstance(value, str):
        unseen = trained is not None and value not in trained.points
        return f"{words.noun}: {value}{', which no training lesion has' if unseen else ''}"
    shown = f"{_number(value)} {words.unit}".strip()
    deviation = None if of_patient else deviation_of(facts.columns[name], place)
    if deviation is not None and abs(deviation) >= NOTABLE:
        typical = _number(middle_of(others_of(facts.columns[name], place)))
        typical = f"{typical} {words.unit}".strip()
        return f"{_deviates(words, deviation)} ({shown}; theirs typically {typical})"
    if trained is None:
        return f"{words.noun}: {shown}"
    below = trained.share_below(value)
    direction, share = (words.higher, below) if below >= 0.5 else (words.lower, 1 - below)
    return (
        f"{words.noun} {direction} than that of {percent(share, 0)} of training lesions ({shown})"
    )


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def deviation_of(column: pl.Series, place: int) -> float | None:
    """Return the distance from the mean of the other lesions, in their standard deviations.

    None if the value is blank, or the others are too few or all alike.
    """
    others = others_of(column, place).to_numpy()
    value = column[place]
    if value is None or len(others) < MIN_COMPARED or not np.std(others, ddof=1) > 0:
        return None
    return float((value - np.mean(others)) / np.std(others, ddof=1))


def _deviates(words: Words, deviation: float) -> str:
    direction = words.higher if deviation > 0 else words.lower
    return (
        f"{words.noun} {abs(deviation):.1f} standard deviations {direction} than this patient's "
        "other lesions"
    )


def _given(facts: PatientFacts, place: int, cause: Cause) -> str:
    """Return a sentence on a network's score or a column of an own table."""
    score = score_of(cause)
    name = score or cause.features[0]
    noun = f"score of its image by {cause.name}" if score else cause.name
    value = _value(facts, name, place)
    if score is None and cause.features != (cause.name,):  # a network without a column of its score
        return f"its image, as {cause.name} describes it"
    if value is None or isinstance(value, str):
        return f"{noun}: {value or 'not recorded'}"
    deviation = deviation_of(facts.columns[name], place)
    if deviation is not None and abs(deviation) >= NOTABLE:
        return _deviates(Words(noun), deviation)
    return f"{noun}: {_number(value)}"


def _unusual(facts: PatientFacts, place: int) -> str:
    deviations = {}
    for name in UNUSUAL.columns:
        if name in facts.columns:
            deviations[name] = abs(deviation_of(facts.columns[name], place) or 0.0)
    largest = sorted(deviations, key=lambda name: -deviations[name])
    nouns = list(dict.fromkeys(WORDS[name].noun for name in largest if deviations[name] >= NOTABLE))
    if not nouns:
        return "its measurements together"
    return f"unlike this patient's other lesions in {', '.join(nouns[:NUM_NAMED])}"
