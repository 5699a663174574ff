"""Scores of the challenge, computed from arrays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score

from isic.arrays import Floats
from isic.runtime.errors import UserError

MIN_TPR = 0.8
TOP_K = 15
# More would change the third digit of an interval.
NUM_RESAMPLES = 200
"""Bootstrap resamples of the patients behind an interval."""


def pauc(target: ArrayLike, score: ArrayLike) -> float:
    """Partial area under the ROC curve above a true-positive rate of 0.8, in [0, 0.2].

    A perfect score gives 0.2, a constant one 0.02, an inverted one 0.

    Args:
        target: [N] of 0 and 1.
        score: [N] finite numbers, higher for malignant; only their order matters.

    Raises:
        UserError: only one class is present, or a score is not finite.
    """
    labels, scores = _checked(target, score)
    # Flipped labels and scores turn the region above TPR 0.8 into the one left of FPR 0.2, for
    # which scikit-learn returns s = (1 + (area - 0.02) / (0.2 - 0.02)) / 2 (McClish 1989, Medical
    # Decision Making 9:190).
    max_fpr = 1 - MIN_TPR
    min_area = max_fpr**2 / 2
    max_area = max_fpr
    standardised = roc_auc_score(1 - labels, -scores, max_fpr=max_fpr)
    return float(min_area + (max_area - min_area) * (2 * standardised - 1))


def above_min_tpr(fpr: Floats, tpr: Floats) -> tuple[Floats, Floats]:
    """Return the part of an ROC curve from TPR 0.8 on; its first point is interpolated.

    `fpr` and `tpr` are [M], rising from (0, 0) to (1, 1).
    """
    # The curve crosses MIN_TPR on the segment that ends at `after`.
    after = int(np.searchsorted(tpr, MIN_TPR, side="right"))
    before = after - 1
    fraction = (MIN_TPR - tpr[before]) / (tpr[after] - tpr[before])
    first_fpr = fpr[before] + fraction * (fpr[after] - fpr[before])
    return np.append(first_fpr, fpr[after:]), np.append(MIN_TPR, tpr[after:])


def bootstrap_pauc(
    target: ArrayLike, scores: Sequence[ArrayLike], group: ArrayLike, num_draws: int, seed: int = 0
) -> Floats:
    """Partial AUC of several scores over bootstrap resamples of groups (patients).

    Args:
        target: [N] of 0 and 1.
        scores: M arrays [N].
        group: [N] identifiers; the rows of a group are resampled together.

    Returns:
        [num_draws, M] float64; all scores share the same resamples.

    Raises:
        UserError: as for `pauc`.
    """
    checked = [_checked(target, score) for score in scores]
    labels = checked[0][0]
    curves = [_Curve(labels, ordered) for _, ordered in checked]
    weights = islice(_row_weights(labels, group, seed), num_draws)
    return np.array([[curve.pauc(weight) for curve in curves] for weight in weights])


def _row_weights(
    labels: NDArray[np.int64], group: ArrayLike, seed: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the number of times that each row [N] is drawn, in resamples with both classes."""
    _, code = np.unique(np.asarray(group), return_inverse=True)
    for drawn in redraws(code.max() + 1, seed):
        weight = drawn[code]
        # Without both classes there is no score; the next resample takes the place.
        if weight[labels == 1].any() and weight[labels == 0].any():
            yield weight


def redraws(num_groups: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield bootstrap resamples without end: [num_groups] count of each group."""
    random = np.random.default_rng(seed)
    while True:
        yield np.bincount(random.integers(num_groups, size=num_groups), minlength=num_groups)


@dataclass(frozen=True)
class Triage:
    """The lesions that score at least `threshold`, which finds a wanted share of malignant ones."""

    threshold: float
    num_lesions: int
    num_malignant: int
    """Malignant lesions among them."""

    @property
    def number_needed(self) -> float:
        """Number needed to triage: lesions to look at per malignant one that is found."""
        return self.num_lesions / self.num_malignant


def triage(target: ArrayLike, score: ArrayLike, sensitivity: float) -> Triage:
    """Choose the highest threshold that finds at least a share of the malignant lesions.

    Args:
        sensitivity: the share, in (0, 1].

    Arguments and errors otherwise as for `pauc`. Lesions of equal score are chosen together.
    """
    labels, scores = _checked(target, score)
    curve = _Curve(labels, scores)
    num_lesions, num_malignant = curve.triage(np.ones(len(labels), np.int64), [sensitivity])[0]
    threshold = float(np.sort(scores)[-num_lesions])
    return Triage(threshold, int(num_lesions), int(num_malignant))


def bootstrap_triage(
    target: ArrayLike,
    score: ArrayLike,
    group: ArrayLike,
    sensitivities: Sequence[float],
    num_draws: int,
    seed: int = 0,
) -> Floats:
    """Number needed to triage over bootstrap resamples of groups (patients).

    Each resample has its own threshold, because its malignant lesions are others. Arguments and
    errors as for `bootstrap_pauc` and `triage`.

    Returns:
        [num_draws, S] float64, by sensitivity.
    """
    labels, scores = _checked(target, score)
    curve = _Curve(labels, scores)
    weights = islice(_row_weights(labels, group, seed), num_draws)
    chosen = np.array([curve.triage(weight, sensitivities) for weight in weights])
    return np.asarray(chosen[..., 0] / chosen[..., 1])


class _Curve:
    """A score, sorted once so that its metrics under many row weights are cheap."""

    def __init__(self, labels: NDArray[np.int64], scores: Floats) -> None:
        self.order = np.argsort(-scores, kind="stable")
        ordered = scores[self.order]
        self.positive = labels[self.order] == 1
        self.starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        """First row of each distinct score: ties are one point of the ROC curve."""

    def pauc(self, weight: NDArray[np.int64]) -> float:
        """Return the pAUC if row i counts weight[i] times; both classes need a weight."""
        ordered = weight[self.order]
        tpr = self._cumulative_rate(np.where(self.positive, ordered, 0))
        fpr = self._cumulative_rate(np.where(self.positive, 0, ordered))
        fpr, tpr = above_min_tpr(fpr, tpr)
        return float(np.trapezoid(1 - fpr, tpr))  # over TPR: the width to the right of the curve

    def triage(
        self, weight: NDArray[np.int64], sensitivities: Sequence[float]
    ) -> NDArray[np.int64]:
        """Return [S, 2] the lesions to look at and the malignant ones among them."""
        ordered = weight[self.order]
        lesions = self._cumulative(ordered)
        malignant = self._cumulative(np.where(self.positive, ordered, 0))
        # Rounded first: 0.8 of 15 must be 12, not the next number above.
        wanted = np.ceil(np.round(np.asarray(sensitivities) * malignant[-1], 9))
        place = np.searchsorted(malignant, np.maximum(wanted, 1))
        return np.stack([lesions[place], malignant[place]], axis=1)

    def _cumulative_rate(self, weight: NDArray[np.int64]) -> Floats:
        """Return the share of the weight at or above each distinct score, from 0 to 1."""
        count = self._cumulative(weight)
        rate: Floats = count / count[-1]
        return rate

    def _cumulative(self, weight: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return 0, then the weight at or above each distinct score."""
        return np.append(0, np.cumsum(np.add.reduceat(weight, self.starts)))


def roc_auc(target: ArrayLike, score: ArrayLike) -> float:
    """Area under the whole ROC curve, in [0, 1]; arguments and errors as for `pauc`."""
    labels, scores = _checked(target, score)
    return float(roc_auc_score(labels, scores))


@dataclass(frozen=True)
class TopK:
    """Malignant lesions among the `k` highest scores of their patient."""

    by_lesion: float
    """Share of all malignant lesions, in [0, 1]."""
    by_patient: float
    """Share per patient, averaged over the patients with a malignant lesion, in [0, 1].

    The challenge's secondary metric: SecondaryMetric-TopNSensitivity.py in
    https://github.com/ISIC-Research/Challenge-2024-Metrics.
    """
    num_patients: int
    """Patients with a malignant lesion."""
    num_small: int
    """Of these, patients with at most `k` lesions, which are all among the `k` for any scores."""


def top_k(target: ArrayLike, score: ArrayLike, patient: ArrayLike, k: int = TOP_K) -> TopK:
    """Count the malignant lesions that are among the `k` highest scores of their patient.

    Ties count against the lesion; the challenge's script ranks equal scores in file order.
    Arguments and errors as for `pauc`; `patient` has [N] identifiers.
    """
    labels, scores = _checked(target, score)
    _, group = np.unique(np.asarray(patient), return_inverse=True)
    size = np.bincount(group)
    is_malignant = labels == 1
    is_found = is_malignant & (_rank_within(group, scores) <= k)
    malignant = np.bincount(group[is_malignant], minlength=len(size))
    found = np.bincount(group[is_found], minlength=len(size))
    affected = malignant > 0
    return TopK(
        by_lesion=float(found.sum() / malignant.sum()),
        by_patient=float(np.mean(found[affected] / malignant[affected])),
        num_patients=int(affected.sum()),
        num_small=int((size[affected] <= k).sum()),
    )


def _rank_within(group: NDArray[np.intp], scores: Floats) -> NDArray[np.intp]:
    """Return [N] the number of rows of the same group that score at least as high."""
    order = np.lexsort((-scores, group))
    ordered_group = group[order]
    ordered = scores[order]
    first = np.searchsorted(ordered_group, ordered_group, side="left")
    # Scores fall within a group, so the last row of a run of equal scores has the run's rank.
    group_changes = ordered_group[1:] != ordered_group[:-1]
    score_changes = ordered[1:] != ordered[:-1]
    ends_run = np.append(group_changes | score_changes, True)
    run = np.cumsum(ends_run) - ends_run  # index of each row's run
    run_end = np.flatnonzero(ends_run)[run]
    rank = np.empty(len(group), dtype=np.intp)
    rank[order] = run_end - first + 1
    return rank


def _checked(target: ArrayLike, score: ArrayLike) -> tuple[NDArray[np.int64], Floats]:
    labels = np.asarray(target, dtype=np.int64)
    scores = np.asarray(score, dtype=np.float64)
    assert labels.shape == scores.shape
    assert labels.ndim == 1
    num_bad = np.count_nonzero(~np.isfinite(scores))
    if num_bad:
        raise UserError(f"{num_bad} of {scores.size} scores are not finite numbers")
    if labels.size == 0 or labels.min() == labels.max():
        raise UserError(
            "a score needs both classes, but every target is the same; use data with both"
        )
    return labels, scores
