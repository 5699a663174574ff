"""The numbers behind the charts. Arrays in, arrays out."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from isic.metrics import MIN_TPR

Values = NDArray[np.float64]
Labels = NDArray[np.integer]

NUM_BINS = 10
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
    """95 % interval of that share (Wilson 1927, Journal of the American Statistical Association 22:209)."""
    num_rows: NDArray[np.int64]


def reliability(target: Labels, score: Values, num_bins: int = NUM_BINS) -> Reliability:
    """Compares scores, read as probabilities, with observed shares.

    A bin holds an equal part of the sum of scores, that is, of the malignant lesions that the scores promise. Bins of
    equal numbers of rows would, at one malignant lesion in a thousand, leave most bins with none.

    Args:
        target, score: [N]; scores in [0, 1].
    """
    order = np.argsort(score, kind="stable")
    labels, scores = np.asarray(target)[order], score[order]
    before = np.cumsum(scores) - scores
    code = np.minimum(
        (before / max(scores.sum(), np.finfo(float).tiny) * num_bins).astype(int), num_bins - 1
    )
    code = np.unique(code, return_inverse=True)[1]
    num_rows = np.bincount(code)
    observed = np.bincount(code, labels) / num_rows
    low, high = wilson(observed, num_rows)
    return Reliability(np.bincount(code, scores) / num_rows, observed, low, high, num_rows)


def wilson(share: Values, number: NDArray[np.int64]) -> tuple[Values, Values]:
    """Returns the 95 % interval of a share among `number` trials."""
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
