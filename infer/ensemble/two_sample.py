"""A classifier that tells rows to score from training rows: it finds differences of all columns.

If both are of one population, no classifier is better than chance on patients that it has not seen
(Lopez-Paz and Oquab 2017, Revisiting Classifier Two-Sample Tests).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.ensemble.boosting.libraries import LIBRARIES, fit_booster, parameters_of
from isic import schema
from isic.arrays import Floats, codes
from isic.features import fit_encoding
from isic.metadata import with_patient

NUM_FOLDS = 3
PARAMETERS = {"num_rounds": 60, "learning_rate": 0.1, "scale_pos_weight": 1.0}
MAX_ROWS = 20_000
"""Rows of each table that are compared; patients are drawn until there are as many."""
UNLIKELY = 4.0
"""Standard errors beyond which a difference is reported, of columns and of the classifier.

In 100 draws of 400 synthetic patients to train on and 200 others, the largest of all differences of
columns was above in one. With tbp_lv_L raised by 5, or from a new hospital, it was above in all.
"""
SMALLEST_ERROR = 1e-3
"""Least standard error: a classifier without an error has none."""


@dataclass(frozen=True)
class TwoSample:
    """The area under the ROC curve of the classifier, on patients that it has not seen."""

    auc: float
    error: float
    """Standard error over patients."""

    @property
    def errors(self) -> float:
        """How far it is above chance, in standard errors."""
        return (self.auc - 0.5) / max(self.error, SMALLEST_ERROR)

    @property
    def differs(self) -> bool:
        return self.errors > UNLIKELY


def compare_tables(
    training: pl.DataFrame, rows: pl.DataFrame, names: Sequence[str], seed: int = 0
) -> TwoSample | None:
    """Compare the raw columns of two tables; None if either has fewer than NUM_FOLDS patients.

    Args:
        names: the columns to compare, of which those that a table lacks are left out.
    """
    columns = [
        name
        for name in (*schema.NUMERIC, *schema.CATEGORICAL)
        if name in names and name in training.columns and name in rows.columns
    ]
    parts = [_sample(with_patient(table), columns, seed) for table in (training, rows)]
    if not columns or min(part[schema.PATIENT].n_unique() for part in parts) < NUM_FOLDS:
        return None
    is_new = np.repeat([0, 1], [len(part) for part in parts])
    table = pl.concat(parts)
    patient = codes(table[schema.PATIENT])
    return auc_over_patients(is_new, _held_out_scores(table, columns, is_new, patient), patient)


def _sample(table: pl.DataFrame, columns: Sequence[str], seed: int) -> pl.DataFrame:
    """Return the rows of random patients, about MAX_ROWS of them."""
    counts = table.group_by(schema.PATIENT).len().sort(schema.PATIENT)
    drawn = counts.sample(fraction=1, shuffle=True, seed=seed)
    wanted = drawn.filter(pl.col("len").cum_sum() - pl.col("len") < MAX_ROWS)
    chosen = table.join(wanted, on=schema.PATIENT, how="semi", maintain_order="left")
    numbers = [pl.col(name).cast(pl.Float32) for name in columns if name in schema.NUMERIC]
    texts = [pl.col(name) for name in columns if name not in schema.NUMERIC]
    return chosen.select(schema.PATIENT, *numbers, *texts)


def _held_out_scores(
    table: pl.DataFrame,
    columns: Sequence[str],
    is_new: NDArray[np.integer],
    patient: NDArray[np.int64],
) -> Floats:
    """Return [N] scores by boosters that have not seen the row's patient."""
    score = np.zeros(len(table))
    fold = folds_of_patients(is_new, patient)
    parameters = parameters_of("lightgbm", PARAMETERS)
    for k in range(NUM_FOLDS):
        rest = table.filter(pl.Series(fold != k))
        encoding = fit_encoding(rest, tuple(columns))
        text = fit_booster(
            "lightgbm", encoding.transform(rest), is_new[fold != k], columns, parameters, k
        )
        held_out = encoding.transform(table.filter(pl.Series(fold == k)))
        score[fold == k] = LIBRARIES["lightgbm"].load(text)(held_out, 1)
    return score


def folds_of_patients(is_new: NDArray[np.integer], patient: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return [N] the fold of each row: those of the patients of each table in turn."""
    fold = np.zeros(patient.max() + 1, np.int64)
    for label in (0, 1):
        members = np.unique(patient[is_new == label])
        order = np.random.default_rng(label).permutation(len(members))
        fold[members] = order % NUM_FOLDS
    return fold[patient]


def auc_over_patients(
    target: NDArray[np.integer], score: Floats, patient: NDArray[np.int64]
) -> TwoSample:
    """Return the AUC, and its standard error for rows that are alike within patients.

    Source: Obuchowski 1997, Nonparametric analysis of clustered ROC curve data, Biometrics 53:567.
    """
    own, other = np.sort(score[target == 1]), np.sort(score[target == 0])
    place = np.empty(len(score))
    place[target == 1] = _share_below(other, score[target == 1])
    place[target == 0] = 1 - _share_below(own, score[target == 0])
    auc = float(place[target == 1].mean())
    size = np.where(target == 1, len(own), len(other))
    # Sums over patients: a patient in both tables is one cluster.
    sums = np.bincount(patient, (place - auc) / size)
    num = np.count_nonzero(np.bincount(patient))
    return TwoSample(auc, float(np.sqrt((sums**2).sum() * num / max(num - 1, 1))))


def _share_below(ranked: Floats, values: Floats) -> Floats:
    """Return the share of sorted numbers below each value; ties count half."""
    below, above = (np.searchsorted(ranked, values, side) for side in ("left", "right"))
    return (below + above) / 2 / len(ranked)
