"""The numbers behind the charts. Arrays in, arrays out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve

from isic.arrays import Floats, Labels
from isic.components import principal_components
from isic.metrics import NUM_RESAMPLES, redraws

NUM_BINS = 10
Z_95 = 1.959964
"""A normal distribution has 95 % within this many standard deviations of its mean."""


def precision_recall(target: Labels, score: Floats) -> tuple[Floats, Floats, float]:
    """Return recall [M] rising from 0, precision [M], and the average precision."""
    precision, recall, _ = precision_recall_curve(target, score, drop_intermediate=True)
    return recall[::-1], precision[::-1], float(average_precision_score(target, score))


@dataclass(frozen=True)
class Reliability:
    """Predicted and observed shares of malignant lesions by bins of rising score; [B] each."""

    mean_score: Floats
    observed: Floats
    """Share of malignant lesions."""
    low: Floats
    high: Floats
    """95 % interval of that share."""
    num_rows: NDArray[np.int64]


def reliability(
    target: Labels, score: Floats, patient: NDArray[Any], num_bins: int = NUM_BINS
) -> Reliability:
    """Compare scores, taken as probabilities, with observed shares.

    Args:
        target, score: [N]; scores in [0, 1].
        patient: [N] identifiers.
    """
    # Bins have equal parts of the sum of scores, that is, of the predicted malignant lesions: with
    # one malignant lesion in a thousand, most bins of equal size would have none.
    code = _bins(score, num_bins)
    num_rows = np.bincount(code)
    observed, low, high = observed_shares(code, target, patient)
    return Reliability(np.bincount(code, score) / num_rows, observed, low, high, num_rows)


def observed_shares(
    code: NDArray[np.intp], target: Labels, patient: NDArray[Any]
) -> tuple[Floats, Floats, Floats]:
    """Return [B] the share of rows with target 1 per bin, and the ends of its 95 % interval.

    Args:
        code: [N] the bin of each row; each of the B bins has rows.
        target, patient: [N].
    """
    num_rows = np.bincount(code)
    observed = np.bincount(code, target) / num_rows
    # The lesions of a patient are not independent, so the intervals hold 95 % of the resamples of
    # the patients. They also hold Wilson's interval for independent lesions: resamples of a bin
    # without a malignant lesion have none either, and so no spread.
    low, high = wilson(observed, num_rows)
    resampled = _resampled_shares(code, target, patient)
    low = np.minimum(low, np.nanpercentile(resampled, 2.5, axis=0))
    high = np.maximum(high, np.nanpercentile(resampled, 97.5, axis=0))
    return observed, low, high


def _bins(score: Floats, num_bins: int) -> NDArray[np.intp]:
    """Return [N] the bin of each score; bins hold equal parts of the sum, numbered from 0."""
    order = np.argsort(score, kind="stable")
    scores = score[order]
    before = np.cumsum(scores) - scores
    part = before / max(scores.sum(), np.finfo(float).tiny) * num_bins
    bin_of_part = np.minimum(part.astype(int), num_bins - 1)
    # A single large score can skip bins: number those that have rows.
    _, numbered = np.unique(bin_of_part, return_inverse=True)
    code = np.empty(len(score), dtype=np.intp)
    code[order] = numbered
    return code


def _resampled_shares(code: NDArray[np.intp], target: Labels, patient: NDArray[Any]) -> Floats:
    """Return [NUM_RESAMPLES, B] the share of malignant lesions; NaN for a bin without rows."""
    _, group = np.unique(patient, return_inverse=True)
    shares = np.full((NUM_RESAMPLES, code.max() + 1), np.nan)
    for share, weight in zip(shares, redraws(group.max() + 1, seed=0), strict=False):
        rows = np.bincount(code, weight[group])
        malignant = np.bincount(code, weight[group] * target)
        np.divide(malignant, rows, out=share, where=rows > 0)
    return shares


def wilson(share: Floats, number: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return the 95 % interval of a share among `number` independent trials.

    Source: Wilson 1927, Journal of the American Statistical Association 22:209.
    """
    square = Z_95**2 / number
    middle = (share + square / 2) / (1 + square)
    variance = share * (1 - share) / number + square / number / 4
    half = Z_95 / (1 + square) * np.sqrt(variance)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


@dataclass(frozen=True)
class Projection:
    """Points on the two directions in which they vary most."""

    points: Floats
    """[N, 2]."""
    explained: tuple[float, float]
    """Share of the total variance along each direction."""


def pca(features: NDArray[np.floating]) -> Projection:
    """Project features [N, D] onto their first two principal components."""
    found = principal_components(features, 2)
    points = (features - found.center) @ found.directions
    explained = found.variances / max(found.total_variance, np.finfo(float).tiny)
    # One feature has one component only: fill up with zeros.
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    first, second = np.pad(explained, (0, 2))[:2].tolist()
    return Projection(points, (first, second))
