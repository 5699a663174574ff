"""Blend models: the mean over a library's seeds, and a weighted mean of ranks over libraries."""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

Scores = NDArray[np.float64]


def model_name(library: str, seed: int) -> str:
    return f"{library}_seed_{seed}"


def seeds_of(names: Iterable[str], libraries: Iterable[str]) -> list[int]:
    """Return the seeds for which every library has a model, ascending."""
    seeds = [
        {int(name.rpartition("_")[2]) for name in names if _is_of(name, library)}
        for library in libraries
    ]
    return sorted(set.intersection(*seeds))


def blend(
    models: Mapping[str, Scores], weights: Mapping[str, float], reference: Mapping[str, Scores]
) -> Scores:
    """Return [N] scores in [0, 1]; the mean probability if there is one library.

    Args:
        models: [N] probabilities by model name.
        weights: by library.
        reference: [M] out-of-fold probabilities of the training rows by model name; unused if there
            is one library.
    """
    if len(weights) == 1:
        (library,) = weights
        return _mean(models, library)
    means = {library: _mean(models, library) for library in weights}
    references = {library: _mean(reference, library) for library in weights}
    return blend_ranks(means, weights, references)


def blend_by_seed(models: Mapping[str, Scores], weights: Mapping[str, float]) -> dict[int, Scores]:
    """Return [N] the blend of each seed's models, which are out of fold, by seed.

    Args:
        models: [N] by model name.
        weights: by library.
    """
    found = {}
    for seed in seeds_of(models, weights):
        names = [model_name(library, seed) for library in weights]
        of_seed = {name: models[name] for name in names}
        # Ranked among its own scores: the rows are those of the reference.
        found[seed] = blend(of_seed, weights, of_seed)
    return found


def blend_ranks(
    scores: Mapping[str, Scores], weights: Mapping[str, float], reference: Mapping[str, Scores]
) -> Scores:
    """Return [N] the weighted mean of ranks among reference scores, in [0, 1].

    Args:
        scores: [N] by name.
        weights: by name; names of weight 0 need no scores.
        reference: [M] out-of-fold scores of the training rows by name.
    """
    # Ranks, because models spread probabilities differently. A row is ranked among the training
    # rows: its rank among the rows to score would depend on the other ones.
    used = {name: weight for name, weight in weights.items() if weight}
    ranks = [weight * rank_among(scores[name], reference[name]) for name, weight in used.items()]
    return np.asarray(sum(ranks) / sum(used.values()))


def rank_among(score: Scores, reference: Scores) -> Scores:
    """Return [N] the share of reference scores below each score, in (0, 1); ties count half."""
    # Interpolated between reference scores and rising beyond them too, so the order is kept.
    values, counts = np.unique(reference, return_counts=True)
    shares = (np.cumsum(counts) - counts / 2) / len(reference)
    # Scores are in [0, 1]; -1 and 2 leave a slope outside the reference scores.
    knots = np.concatenate([[-1.0], values, [2.0]])
    ranks = np.concatenate([[0.0], shares, [1.0]])
    return np.asarray(np.interp(score, knots, ranks))


def to_scale_of(score: Scores, reference: Scores, other: Scores) -> Scores:
    """Return [N] the values as high among another model's out-of-fold scores as the scores are.

    Args:
        score: [N].
        reference: [M] out-of-fold scores of the same model.
        other: [M] those of the other model.
    """
    return np.asarray(np.quantile(other, rank_among(score, reference)))


def rank_correlation(first: Scores, second: Scores) -> float | None:
    """Return Spearman's coefficient of two scores [N]; None if one is the same in all rows."""
    if min(np.ptp(first), np.ptp(second)) == 0:
        return None
    return float(spearmanr(first, second).statistic)


def _mean(models: Mapping[str, Scores], library: str) -> Scores:
    seeds = [score for name, score in models.items() if _is_of(name, library)]
    return np.asarray(np.mean(seeds, axis=0))


def _is_of(name: str, library: str) -> bool:
    return name == library or name.startswith(f"{library}_seed_")
