"""Whether a second set of scores is better than a first, or the difference is chance.

Two kinds of chance are looked at. Fitting: a paired t-test over seeds, or over whole training runs.
Patients: a bootstrap. A difference is called noise unless both call it one, in the same direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import ttest_rel

from isic.metrics import bootstrap_pauc, pauc

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Comparison:
    """Paired values of a first and a second side; the second is the one that is judged."""

    fits: NDArray[np.float64]
    """[F, 2] pAUC by seed or by run; with fewer than two rows the patients alone decide."""
    draws: NDArray[np.float64]
    """[D, 2] pAUC by redraw of the patients."""

    @property
    def tested(self) -> bool:
        """Whether there is a spread over fits to test."""
        return len(self.fits) > 1

    @property
    def difference(self) -> float:
        """Second minus first in the mean over fits."""
        return float((self.fits[:, 1] - self.fits[:, 0]).mean())

    @property
    def wins(self) -> int:
        """The number of fits in which the second is better."""
        return int((self.fits[:, 1] > self.fits[:, 0]).sum())

    @cached_property
    def p(self) -> float:
        """Two-sided p of the paired t-test over fits; 1 when no pair differs."""
        if np.array_equal(self.fits[:, 0], self.fits[:, 1]):
            return 1.0
        return float(ttest_rel(self.fits[:, 1], self.fits[:, 0]).pvalue)

    @cached_property
    def interval(self) -> tuple[float, float, float]:
        """Low end, median and high end of second minus first in 95 % of the redraws of patients."""
        low, middle, high = np.percentile(self.draws[:, 1] - self.draws[:, 0], [2.5, 50, 97.5])
        return float(low), float(middle), float(high)

    @property
    def certain(self) -> bool:
        """Whether both kinds of chance are excluded."""
        low, _, high = self.interval
        by_patient = int(low > 0) - int(high < 0)
        by_fit = int(np.sign(self.difference)) if self.tested and self.p < SIGNIFICANT else 0
        return by_patient != 0 and (not self.tested or by_fit == by_patient)

    @property
    def verdict(self) -> str:
        return "a difference" if self.certain else "noise"

    def row(self) -> dict[str, Any]:
        """Returns the columns of a table of results; all None when the sides are the same scores."""
        low, _, high = self.interval
        columns = {
            "difference": round(self.difference, 4) if len(self.fits) else None,
            "better_in": f"{self.wins} of {len(self.fits)}" if self.tested else None,
            "p": float(f"{self.p:.1g}") if self.tested else None,
            "low": round(low, 4),
            "high": round(high, 4),
            "verdict": self.verdict,
        }
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
    """Returns [num_draws, 2] the mean pAUC of each side's scores under the same redraws of patients.

    Args:
        target, patient: [N].
        first, second: scores [N] of each side, one or several.
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
    """Compares two sides by seed, and by the mean of their seeds' scores under redraws of patients.

    Args:
        target, patient: [N].
        first, second: [seeds, N] scores.
    """
    sides = (first, second)
    by_seed = np.array([[pauc(target, score) for score in side] for side in sides]).T
    means = [side.mean(axis=0) for side in sides]
    return Comparison(by_seed, patient_draws(target, means[:1], means[1:], patient, num_draws))
