"""Test whether a second set of scores is better than a first, or different by chance.

A paired t-test over seeds or training runs covers chance in fitting, one over the folds of several
fold plans also the choice of the folds, and a bootstrap over patients the choice of patients. A
difference is noise unless both tests find it, in the same direction.

Folds have most of their training rows in common, so their differences are correlated, and a plain
t-test would find differences by chance. Nadeau and Bengio 2003 (Machine Learning 52:239) add the
ratio of test to training rows to the variance of their mean; Bouckaert and Frank 2004 (PAKDD, LNCS
3056:3) apply this to all folds of repeated cross-validation, as here. Means over whole plans would
be worse units: each plan tests every row, so plans agree even on a difference by chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

from isic.metrics import bootstrap_pauc, pauc

SIGNIFICANT = 0.05
ONE_RUN = " between these trained models"


@dataclass(frozen=True)
class Comparison:
    """Paired values of a first and a second side; the second is judged against the first."""

    fits: NDArray[np.float64]
    """[F, 2] pAUC per seed, run or fold; with fewer than two, only the patients decide."""
    draws: NDArray[np.float64]
    """[D, 2] pAUC per bootstrap sample of the patients."""
    unit: str = "seeds"
    """The kind of fits: seeds, boosters, runs or folds."""
    overlap: float = 0.0
    """Test rows per training row of folds, whose training rows overlap; 0 for other fits."""
    trained_once: bool = False
    """Whether the fits of a side share trained models, so that chance in training is not tested."""

    @property
    def tested(self) -> bool:
        """Whether there are enough fits for a test."""
        return len(self.fits) > 1

    @property
    def difference(self) -> float:
        """Second minus first, mean over fits."""
        return float((self.fits[:, 1] - self.fits[:, 0]).mean())

    @property
    def wins(self) -> int:
        """The number of fits in which the second is better."""
        return int((self.fits[:, 1] > self.fits[:, 0]).sum())

    @cached_property
    def p(self) -> float:
        """Two-sided p of the paired t-test over fits; 1 when no pair differs."""
        # The t-test would divide by zero.
        if np.array_equal(self.fits[:, 0], self.fits[:, 1]):
            return 1.0
        differences = self.fits[:, 1] - self.fits[:, 0]
        number = len(differences)
        variance = differences.var(ddof=1) * (1 / number + self.overlap)
        # Equal differences have no variance and p = 0.
        with np.errstate(divide="ignore"):
            statistic = np.abs(differences.mean()) / np.sqrt(variance)
        return float(2 * student_t.sf(statistic, number - 1))

    @cached_property
    def interval(self) -> tuple[float, float, float]:
        """2.5 %, 50 % and 97.5 % percentile of second minus first over bootstrap samples."""
        low, middle, high = np.percentile(self.draws[:, 1] - self.draws[:, 0], [2.5, 50, 97.5])
        return float(low), float(middle), float(high)

    @property
    def certain(self) -> bool:
        """Whether both tests find a difference, in the same direction."""
        low, _, high = self.interval
        if low <= 0 <= high:
            return False
        if not self.tested:
            return True
        same_direction = (self.difference > 0) == (low > 0)
        return self.p < SIGNIFICANT and same_direction

    @property
    def verdict(self) -> str:
        if not self.certain:
            return "noise"
        return f"a difference{ONE_RUN if self.trained_once else ''}"

    def row(self) -> dict[str, Any]:
        """Return the columns of a table of results; all None if both sides are the same scores."""
        low, _, high = self.interval
        columns = {
            "difference": round(self.difference, 4) if len(self.fits) else None,
            "better_in": f"{self.wins} of {len(self.fits)}" if self.tested else None,
            "p": float(f"{self.p:.1g}") if self.tested else None,
            "low": round(low, 4),
            "high": round(high, 4),
            "verdict": self.verdict,
        }
        # The first row of a table is compared with itself.
        same = np.array_equal(self.draws[:, 0], self.draws[:, 1])
        return dict.fromkeys(columns) if same else columns


def patient_draws(
    target: ArrayLike,
    first: Sequence[ArrayLike],
    second: Sequence[ArrayLike],
    patient: ArrayLike,
    num_draws: int,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Return [num_draws, 2] each side's mean pAUC in the same bootstrap samples of patients.

    Args:
        target, patient: [N].
        first, second: one or more scores [N] per side.
    """
    draws = bootstrap_pauc(target, [*first, *second], patient, num_draws, seed)
    sides = draws[:, : len(first)], draws[:, len(first) :]
    return np.stack([side.mean(axis=1) for side in sides], axis=1)


def compare_scores(
    target: NDArray[np.integer],
    patient: NDArray[np.str_],
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    num_draws: int,
) -> Comparison:
    """Compare the pAUC per seed, and that of the seeds' mean scores per bootstrap sample.

    Args:
        target, patient: [N].
        first, second: [seeds, N] scores.
    """
    by_seed = np.array([[pauc(target, score) for score in side] for side in (first, second)]).T
    # The ensemble of all seeds is what would be used, so the patients are drawn for its score.
    first_mean = [first.mean(axis=0)]
    second_mean = [second.mean(axis=0)]
    return Comparison(by_seed, patient_draws(target, first_mean, second_mean, patient, num_draws))
