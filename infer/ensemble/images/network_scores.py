"""Each network's own out-of-fold score, and how alike the networks rank the lesions."""

import itertools
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.ensemble.blends.ranks import rank_correlation
from infer.ensemble.scoring.scores import summarise
from isic import schema


def describe_networks(
    scores: pl.DataFrame, oof: pl.DataFrame, patient: NDArray[np.str_]
) -> dict[str, Any]:
    """Return the networks' metrics, and the rank correlation of each pair.

    Args:
        scores: [N] per network, by the name of its column; null for an unreadable image.
        oof: `target` and `fold`, [N].
        patient: [N].

    Returns:
        `scores`, by the name of the column, as `summarise` returns them; `correlations`, a list of
        `pair`, and Spearman's coefficient over `all` lesions and the `malignant` ones (None if a
        score is the same for all of these).
    """
    # As in the mean of the networks, a row without a score counts as 0, the mean.
    scores = scores.fill_null(0.0)
    target = oof[schema.TARGET].to_numpy()
    fold = oof["fold"].to_numpy()
    summaries = {
        column.name: summarise(target, column.to_numpy(), fold, patient) for column in scores
    }
    correlations = [
        {
            "pair": list(pair),
            "all": _correlation(scores.select(pair)),
            "malignant": _correlation(scores.select(pair).filter(target == 1)),
        }
        for pair in itertools.combinations(scores.columns, 2)
    ]
    return {"scores": summaries, "correlations": correlations}


def _correlation(pair: pl.DataFrame) -> float | None:
    return rank_correlation(*(column.to_numpy() for column in pair))
