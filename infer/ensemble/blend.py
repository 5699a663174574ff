"""From the scores of many boosters to one a row: the mean within a library, weighted ranks between libraries.

Libraries differ in how they spread probabilities, so between them only the order of rows counts. A row's rank is its
place among the out-of-fold scores of the training rows: it needs no other row to score, and one row has a rank too.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


def model_name(library: str, seed: int) -> str:
    return f"{library}_seed_{seed}"


def seeds_of(names: Iterable[str], libraries: Iterable[str]) -> list[int]:
    """Returns the seeds that every one of the libraries has a model of, ascending."""
    seeds = [
        {int(name.rpartition("_")[2]) for name in names if _is_of(name, library)}
        for library in libraries
    ]
    return sorted(set.intersection(*seeds))


def blend(
    models: Mapping[str, Scores], weights: Mapping[str, float], reference: Mapping[str, Scores]
) -> Scores:
    """Returns [N] one score a row in [0, 1].

    Args:
        models: [N] probabilities by the model's name.
        weights: by library. One alone keeps its probabilities.
        reference: [M] out-of-fold probabilities of the training rows, by the same names; not looked at for one.
    """
    if len(weights) == 1:
        return _mean(models, next(iter(weights)))
    total = sum(weights.values())
    ranks = (
        weight * rank(_mean(models, name), _mean(reference, name))
        for name, weight in weights.items()
    )
    return np.asarray(sum(ranks) / total)


def rank(score: Scores, reference: Scores) -> Scores:
    """Returns [N] the share of reference scores below each score, in (0, 1); ties count half.

    Between two reference scores it is interpolated, and beyond them it still rises, so that no order is lost.
    """
    values, counts = np.unique(reference, return_counts=True)
    place = (np.cumsum(counts) - counts / 2) / len(reference)
    knots, places = np.concatenate([[-1.0], values, [2.0]]), np.concatenate([[0.0], place, [1.0]])
    return np.asarray(np.interp(score, knots, places))


def _mean(models: Mapping[str, Scores], library: str) -> Scores:
    return np.asarray(
        np.mean([score for name, score in models.items() if _is_of(name, library)], axis=0)
    )


def _is_of(name: str, library: str) -> bool:
    return name == library or name.startswith(f"{library}_seed_")
