"""Probabilities from scores: a rising curve that is fitted on out-of-fold scores.

Boosters are fitted on a sample of the negatives and with weighted positives, so their scores are
above the true shares of malignant lesions. Out-of-fold scores are of every row, of all negatives
too: a curve that is fitted on them corrects both, and its probabilities are those of the training
table's share of malignant lesions. `shift_prevalence` moves them to another share.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression

from infer.ensemble.blends.ranks import Scores
from isic import schema

Method = Literal["isotonic", "platt"]
Constants = dict[str, list[float]]
Target = NDArray[np.integer]

CALIBRATION = "calibration"
"""Key of `summarise_out_of_fold` among the metrics of a blend."""
SMALLEST = 1e-6
"""Scores are at least this far from 0 and 1 before their log odds are taken."""
NUM_BINS = 10
"""Bins of equal numbers of rows in `calibration_error`."""


@dataclass(frozen=True)
class Calibration:
    """A curve that never falls, from scores to probabilities."""

    method: Method
    constants: Constants
    """See `CURVES`."""
    prevalence: float
    """Share of malignant lesions in the rows of the fit."""

    def probability(self, score: Scores) -> Scores:
        """Return [N] probabilities, strictly between 0 and 1. Equal scores have equal ones."""
        return CURVES[self.method][1](self.constants, score)

    def to_json(self) -> dict[str, Any]:
        return vars(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Calibration":
        return cls(value["method"], value["constants"], value["prevalence"])


def fit_calibration(method: Method, score: Scores, target: Target) -> Calibration:
    """Fit a curve on out-of-fold scores.

    Args:
        score: [N] in [0, 1].
        target: [N].
    """
    return Calibration(method, CURVES[method][0](score, target), float(target.mean()))


def out_of_fold_probability(
    method: Method, score: Scores, target: Target, fold: NDArray[np.integer]
) -> Scores:
    """Return [N] probabilities, each fold's by a curve that was fitted on the other folds."""
    found = np.zeros(len(score))
    for k in np.unique(fold):
        held_out = fold == k
        curve = fit_calibration(method, score[~held_out], target[~held_out])
        found[held_out] = curve.probability(score[held_out])
    return found


def shift_prevalence(probability: Scores, known: float, wanted: float) -> Scores:
    """Return [N] probabilities if another share of the lesions is malignant.

    This holds if lesions of each class are as in training, and only their numbers differ: by
    Bayes' rule the odds are multiplied by the ratio of the odds of the shares (Saerens et al.
    2002, Neural Computation 14:21).
    """
    return np.asarray(expit(logit(probability) + logit(wanted) - logit(known)))


def summarise_out_of_fold(method: Method, before: Scores, oof: pl.DataFrame) -> dict[str, Any]:
    """Return the method, and its measures by curves that were fitted on the other folds.

    Args:
        before: [N] the mean probability of the models, which is not calibrated.
        oof: `blend`, `target` and `fold` of the same rows.
    """
    score, target, fold = (oof[name].to_numpy() for name in ("blend", schema.TARGET, "fold"))
    after = out_of_fold_probability(method, score, target, fold)
    return {"method": method, **summarise_calibration(before, after, target)}


def summarise_calibration(before: Scores, after: Scores, target: Target) -> dict[str, float]:
    """Return the measures of probabilities before and after calibration.

    Returns:
        `malignant`, the share of malignant lesions, and of each side, such as `brier_after`: the
        `mean`, the `brier` score (mean squared distance from the target) and the `error`, see
        `calibration_error`.
    """
    found = {"malignant": float(target.mean())}
    for name, probability in (("before", before), ("after", after)):
        found[f"mean_{name}"] = float(probability.mean())
        found[f"brier_{name}"] = float(np.mean((probability - target) ** 2))
        found[f"error_{name}"] = calibration_error(probability, target)
    return found


def calibration_error(probability: Scores, target: Target) -> float:
    """Return the mean distance of probabilities from shares, over bins of equally many rows."""
    order = np.argsort(probability, kind="stable")
    bins = np.array_split(order, min(NUM_BINS, len(order)))
    distances = [abs(float(np.mean(probability[rows] - target[rows]))) for rows in bins]
    return float(np.average(distances, weights=[len(rows) for rows in bins]))


def describe_calibration(found: Mapping[str, Any]) -> str:
    """Return the result of `summarise_out_of_fold` as a sentence without its end."""
    measures = {"Brier score": "brier", "calibration error": "error", "mean": "mean"}
    changes = (
        f"{name} {found[f'{key}_before']:.4f} to {found[f'{key}_after']:.4f}"
        for name, key in measures.items()
    )
    return (
        f"{found['method']} calibration: {', '.join(changes)} (malignant {found['malignant']:.4f})"
    )


def _fit_isotonic(score: Scores, target: Target) -> Constants:
    # By Laplace's rule no probability is 0 or 1, however many lesions agree.
    least = 1 / (len(score) + 2)
    curve = IsotonicRegression(y_min=least, y_max=1 - least).fit(score, target)
    return {"scores": curve.X_thresholds_.tolist(), "probabilities": curve.y_thresholds_.tolist()}


def _isotonic(constants: Constants, score: Scores) -> Scores:
    return np.asarray(np.interp(score, constants["scores"], constants["probabilities"]))


def _fit_platt(score: Scores, target: Target) -> Constants:
    """Fit a logistic curve to the log odds of the scores.

    Platt 1999, "Probabilistic outputs for support vector machines": targets are moved away from 0
    and 1, so that the curve is finite if the scores separate the classes.
    """
    num_positive = int(target.sum())
    num_negative = len(target) - num_positive
    is_positive = target == 1
    goal = np.where(is_positive, (num_positive + 1) / (num_positive + 2), 1 / (num_negative + 2))
    odds = _log_odds(score)

    def loss(line: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        z = line[0] * odds + line[1]
        error = expit(z) - goal
        return float(np.mean(np.logaddexp(0, z) - goal * z)), np.array(
            [np.mean(error * odds), np.mean(error)]
        )

    slope, intercept = minimize(loss, [1.0, 0.0], jac=True, method="BFGS").x.tolist()
    if slope <= 0:  # no better than chance: the same probability for all
        slope, intercept = 0.0, float(logit(goal.mean()))
    return {"line": [slope, intercept]}


def _platt(constants: Constants, score: Scores) -> Scores:
    slope, intercept = constants["line"]
    return np.asarray(expit(slope * _log_odds(score) + intercept))


def _log_odds(score: Scores) -> Scores:
    return np.asarray(logit(np.clip(score, SMALLEST, 1 - SMALLEST)))


Fit = Callable[[Scores, Target], Constants]
Curve = Callable[[Constants, Scores], Scores]
CURVES: Mapping[Method, tuple[Fit, Curve]] = {
    "isotonic": (_fit_isotonic, _isotonic),
    "platt": (_fit_platt, _platt),
}
"""How to fit the constants of each method, and the curve with them.

`isotonic` is straight lines between `scores` and their `probabilities`; `platt` is a logistic curve
of the log odds, with the slope and the intercept of its `line`.
"""
