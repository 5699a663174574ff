"""The classifier of training against other rows: chance is no difference, and planted ones are."""

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from infer.ensemble.two_sample import auc_over_patients, compare_tables, folds_of_patients
from isic import schema
from isic.arrays import codes
from isic.synth.rows import draw_rows

NAMES = (*schema.NUMERIC, *schema.CATEGORICAL)


def split_population(seed: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the rows of two thirds and of one third of the patients of one table."""
    rng = np.random.default_rng(seed)
    patients = [f"IP_{patient:07d}" for patient in range(450)]
    ids = [f"ISIC_{row:07d}" for row in range(3000)]
    table = draw_rows(ids, patients, 60, rng).table
    others = pl.col(schema.PATIENT).is_in(rng.permutation(patients)[:150].tolist())
    return table.filter(~others), table.filter(others)


@pytest.mark.parametrize("seed", range(2))
def test_only_real_differences_are_found(seed: int) -> None:
    train, test = split_population(seed)
    same = compare_tables(train, test, NAMES)
    assert same
    assert not same.differs
    for change in (pl.col("tbp_lv_L") + 8, pl.lit("Another hospital").alias("attribution")):
        changed = compare_tables(train, test.with_columns(change), NAMES)
        assert changed
        assert changed.differs
        assert changed.auc > same.auc + 0.1


def test_a_difference_of_columns_together_is_found() -> None:
    """Each column by itself is as in training, but two no longer belong together."""
    train, test = split_population(3)
    shuffled = pl.col("tbp_lv_areaMM2").shuffle(seed=1)
    found = compare_tables(train, test.with_columns(shuffled), NAMES)
    assert found
    assert found.differs


def test_few_patients_are_not_compared() -> None:
    train, test = split_population(0)
    two = test[schema.PATIENT].unique().sort()[:2].to_list()
    assert compare_tables(train, test.filter(pl.col(schema.PATIENT).is_in(two)), NAMES) is None


def test_the_error_is_the_spread_over_samples_of_patients() -> None:
    rng = np.random.default_rng(0)

    def sample() -> tuple[float, float]:
        sizes = rng.integers(1, 30, 120)
        patient = np.repeat(np.arange(120), sizes)
        target = np.repeat(rng.integers(0, 2, 120), sizes)
        score = np.repeat(rng.normal(size=120), sizes) + rng.normal(size=len(patient))
        found = auc_over_patients(target, score, patient)
        assert found.auc == pytest.approx(roc_auc_score(target, score))
        return found.auc, found.error

    auc, error = np.array([sample() for _ in range(300)]).T
    assert error.mean() == pytest.approx(auc.std(), rel=0.15)


def test_patients_are_in_one_fold_each() -> None:
    train, test = split_population(1)
    patient = codes(pl.concat([train, test])[schema.PATIENT])
    is_new = np.repeat([0, 1], [len(train), len(test)])
    fold = folds_of_patients(is_new, patient)
    for k in range(3):
        assert not {*patient[fold == k]} & {*patient[fold != k]}
        assert {*is_new[fold == k]} == {0, 1}
