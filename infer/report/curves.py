"""The numbers behind the charts. Arrays in, arrays out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from isic.metrics import MIN_TPR, redraws

Values = NDArray[np.float64]
Labels = NDArray[np.integer]

NUM_BINS = 10
NUM_DRAWS = 200
"""Redraws of the patients."""
Z_95 = 1.959964
"""Standard deviations of a normal distribution to either side that hold 95 % of it."""


def roc(target: Labels, score: Values) -> tuple[Values, Values]:
    """Returns false- and true-positive rate [M] from (0, 0) to (1, 1); the curve is straight between its points."""
    false_positives, true_positives, _ = roc_curve(target, score)
    return false_positives, true_positives


def scored_region(fpr: Values, tpr: Values) -> tuple[Values, Values]:
    """Returns the corners of what the challenge scores: the region under the curve and above TPR 0.8.

    Its area is the partial AUC.
    """
    after = int(np.searchsorted(tpr, MIN_TPR, side="right"))
    share = (MIN_TPR - tpr[after - 1]) / (tpr[after] - tpr[after - 1])
    start = fpr[after - 1] + share * (fpr[after] - fpr[after - 1])
    return np.concatenate([[start], fpr[after:], [1.0]]), np.concatenate(
        [[MIN_TPR], tpr[after:], [MIN_TPR]]
    )


def precision_recall(target: Labels, score: Values) -> tuple[Values, Values, float]:
    """Returns recall rising from 0, precision [M], and the average precision.

    Average precision is the area under the steps that hold each precision back to the recall before it.
    """
    precision, recall, _ = precision_recall_curve(target, score, drop_intermediate=True)
    return recall[::-1], precision[::-1], float(average_precision_score(target, score))


@dataclass(frozen=True)
class Reliability:
    """What scores promise and what came true, by bins of rising score; [B] each."""

    mean_score: Values
    observed: Values
    """Share of malignant lesions."""
    low: Values
    high: Values
    """95 % interval of that share."""
    num_rows: NDArray[np.int64]


def reliability(
    target: Labels, score: Values, patient: NDArray[Any], num_bins: int = NUM_BINS
) -> Reliability:
    """Compares scores, read as probabilities, with observed shares.

    A bin holds an equal part of the sum of scores, that is, of the malignant lesions that the scores promise. Bins of
    equal numbers of rows would, at one malignant lesion in a thousand, leave most bins with none.

    A patient's lesions are not independent, so the intervals hold 95 % of the redraws of the
    patients. They also hold Wilson's interval for independent lesions: redraws of a bin without a
    malignant lesion have none either, and so no spread.

    Args:
        target, score: [N]; scores in [0, 1].
        patient: [N] identifiers.
    """
    code = _bins(score, num_bins)
    num_rows = np.bincount(code)
    observed = np.bincount(code, target) / num_rows
    low, high = wilson(observed, num_rows)
    drawn = _redrawn_shares(code, target, patient)
    return Reliability(
        np.bincount(code, score) / num_rows,
        observed,
        np.minimum(low, np.nanpercentile(drawn, 2.5, axis=0)),
        np.maximum(high, np.nanpercentile(drawn, 97.5, axis=0)),
        num_rows,
    )


def _bins(score: Values, num_bins: int) -> NDArray[np.intp]:
    """Returns [N] the bin of each score; bins hold equal parts of the sum and are numbered from 0."""
    order = np.argsort(score, kind="stable")
    scores = score[order]
    before = np.cumsum(scores) - scores
    part = before / max(scores.sum(), np.finfo(float).tiny) * num_bins
    code = np.empty(len(score), dtype=np.intp)
    code[order] = np.unique(np.minimum(part.astype(int), num_bins - 1), return_inverse=True)[1]
    return code


def _redrawn_shares(code: NDArray[np.intp], target: Labels, patient: NDArray[Any]) -> Values:
    """Returns [NUM_DRAWS, B] the share of malignant lesions by redraw; NaN for a bin left empty."""
    group = np.unique(patient, return_inverse=True)[1]
    drawn = np.full((NUM_DRAWS, code.max() + 1), np.nan)
    for share, weight in zip(drawn, redraws(group.max() + 1, seed=0), strict=False):
        rows = np.bincount(code, weight[group])
        malignant = np.bincount(code, weight[group] * target)
        np.divide(malignant, rows, out=share, where=rows > 0)
    return drawn


def wilson(share: Values, number: NDArray[np.int64]) -> tuple[Values, Values]:
    """Returns the 95 % interval of a share among `number` independent trials.

    Source: Wilson 1927, Journal of the American Statistical Association 22:209.
    """
    square = Z_95**2 / number
    middle = (share + square / 2) / (1 + square)
    half = Z_95 / (1 + square) * np.sqrt(share * (1 - share) / number + square / number / 4)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


@dataclass(frozen=True)
class Projection:
    """Points on the two directions in which they vary most."""

    points: Values
    """[N, 2]."""
    explained: tuple[float, float]
    """Share of the whole variance along each."""


def pca(features: NDArray[np.floating]) -> Projection:
    """Projects features [N, D] onto their first two principal components, each turned so that its largest
    coefficient is positive."""
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    _, singular, components = np.linalg.svd(centred, full_matrices=False)
    components, singular = components[:2], singular**2
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    points = centred @ (components * np.sign(largest)).T
    total = max(singular.sum(), np.finfo(float).tiny)
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    first, second = np.pad(singular[:2] / total, (0, 2))[:2].tolist()
    return Projection(points, (first, second))
