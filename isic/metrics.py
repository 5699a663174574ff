"""Scores of the challenge. Arrays in, a float out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score

from isic.errors import UserError

MIN_TPR = 0.8
TOP_K = 15


def pauc(target: ArrayLike, score: ArrayLike) -> float:
    """Partial area under the ROC curve above 80 % true-positive rate, in [0, 0.2].

    A constant score gives 0.02, a perfect one 0.2, an inverted one 0. Flipping labels and scores turns the region
    above TPR 0.8 into the one left of FPR 0.2, whose area scikit-learn returns standardised by McClish's formula
    (McClish 1989, Medical Decision Making 9:190): s = (1 + (area - 0.02) / (0.2 - 0.02)) / 2. This undoes it.

    Args:
        target: [N] of 0 and 1.
        score: [N] finite numbers, higher is more likely malignant; only their order matters.

    Raises:
        UserError: only one class is present, or a score is not finite.
    """
    labels, scores = _checked(target, score)
    max_fpr = 1 - MIN_TPR
    min_area, max_area = max_fpr**2 / 2, max_fpr
    standardised = roc_auc_score(1 - labels, -scores, max_fpr=max_fpr)
    return float(min_area + (max_area - min_area) * (2 * standardised - 1))


def bootstrap_pauc(
    target: ArrayLike, scores: Sequence[ArrayLike], group: ArrayLike, num_draws: int, seed: int = 0
) -> NDArray[np.float64]:
    """Partial AUC of several scores under the same redraws of whole groups (patients) with replacement.

    Args:
        target: [N] of 0 and 1.
        scores: M arrays [N].
        group: [N] identifiers; the rows of a group are drawn together.
        num_draws: redraws that hold both classes; others are drawn again.

    Returns:
        [num_draws, M].
    """
    checked = [_checked(target, score) for score in scores]
    curves = [_Curve(labels, values) for labels, values in checked]
    _, code = np.unique(np.asarray(group), return_inverse=True)
    weights, labels = (drawn[code] for drawn in redraws(code.max() + 1, seed)), checked[0][0]
    usable = (
        weight for weight in weights if weight[labels == 1].any() and weight[labels == 0].any()
    )
    return np.array(
        [[curve.pauc(weight) for curve in curves] for weight in islice(usable, num_draws)]
    )


def redraws(num_groups: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yields endless redraws of groups with replacement: [num_groups] how often each is drawn."""
    random = np.random.default_rng(seed)
    while True:
        yield np.bincount(random.integers(num_groups, size=num_groups), minlength=num_groups)


class _Curve:
    """A score sorted once, so that many weightings of its rows are cheap."""

    def __init__(self, labels: NDArray[np.int64], scores: NDArray[np.float64]) -> None:
        self.order = np.argsort(-scores, kind="stable")
        ordered = scores[self.order]
        self.positive = labels[self.order] == 1
        self.starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        """Where each distinct score begins: ties are one point of the curve."""

    def pauc(self, weight: NDArray[np.int64]) -> float:
        """Area between the curve, TPR 0.8 and TPR 1, to the right of the curve; weight: [N] times each row counts."""
        ordered = weight[self.order]
        positive, negative = (
            np.append(0, np.cumsum(np.add.reduceat(ordered * mask, self.starts)))
            for mask in (self.positive, ~self.positive)
        )
        tpr, fpr = positive / positive[-1], negative / negative[-1]
        after = np.searchsorted(tpr, MIN_TPR, side="right")
        share = (MIN_TPR - tpr[after - 1]) / (tpr[after] - tpr[after - 1])
        first = fpr[after - 1] + share * (fpr[after] - fpr[after - 1])
        return float(
            np.trapezoid(1 - np.append(first, fpr[after:]), np.append(MIN_TPR, tpr[after:]))
        )


def roc_auc(target: ArrayLike, score: ArrayLike) -> float:
    """Area under the whole ROC curve, in [0, 1]. Arguments and errors as for `pauc`."""
    labels, scores = _checked(target, score)
    return float(roc_auc_score(labels, scores))


@dataclass(frozen=True)
class TopK:
    """Malignant lesions among the `k` highest scores of their patient."""

    by_lesion: float
    """Share of all malignant lesions, in [0, 1]."""
    by_patient: float
    """Mean over patients who have any of the share of their malignant lesions, in [0, 1].

    This ranks submissions for the challenge's secondary prize, see SecondaryMetric-TopNSensitivity.py
    in https://github.com/ISIC-Research/Challenge-2024-Metrics. A tie of two submissions is broken
    there by the place of the lesions among the `k`, which is not computed here.
    """
    num_patients: int
    """Patients with a malignant lesion."""
    num_small: int
    """Of them, those with at most `k` lesions: whatever the scores, all of theirs are among the `k`."""


def top_k(target: ArrayLike, score: ArrayLike, patient: ArrayLike, k: int = TOP_K) -> TopK:
    """Counts the malignant lesions that are among the `k` highest scores of their patient.

    A tie counts against the lesion: its rank is the number of the patient's lesions that score at
    least as high. The challenge's script takes the first of equal scores in the order of the file.

    Args:
        target, score: as for `pauc`.
        patient: [N] identifiers.
    """
    labels, scores = _checked(target, score)
    _, group = np.unique(np.asarray(patient), return_inverse=True)
    malignant, size = np.bincount(group, labels), np.bincount(group)
    found = np.bincount(group, (labels == 1) & (_rank_within(group, scores) <= k))
    affected = malignant > 0
    return TopK(
        by_lesion=float(found.sum() / malignant.sum()),
        by_patient=float(np.mean(found[affected] / malignant[affected])),
        num_patients=int(affected.sum()),
        num_small=int((size[affected] <= k).sum()),
    )


def _rank_within(group: NDArray[np.intp], scores: NDArray[np.float64]) -> NDArray[np.intp]:
    """Returns [N] the number of rows of the same group that score at least as high."""
    order = np.lexsort((-scores, group))
    ordered_group, ordered = group[order], scores[order]
    first = np.searchsorted(ordered_group, ordered_group, side="left")
    # Within a group the scores fall, so the last of a run of equal ones has the run's worst rank.
    ends_run = np.append(
        (ordered_group[1:] != ordered_group[:-1]) | (ordered[1:] != ordered[:-1]), True
    )
    run_end = np.flatnonzero(ends_run)[np.cumsum(ends_run) - ends_run]
    rank = np.empty(len(group), dtype=np.intp)
    rank[order] = run_end - first + 1
    return rank


def _checked(target: ArrayLike, score: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    labels = np.asarray(target, dtype=np.int64)
    scores = np.asarray(score, dtype=np.float64)
    assert labels.shape == scores.shape and labels.ndim == 1
    if not np.isfinite(scores).all():
        raise UserError(
            f"{np.count_nonzero(~np.isfinite(scores))} of {scores.size} scores are not finite numbers"
        )
    if labels.size == 0 or labels.min() == labels.max():
        raise UserError(
            "a score needs both classes: every target here is the same; use data with both"
        )
    return labels, scores
