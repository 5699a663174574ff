import numpy as np
import pytest
from scipy.stats import t as student_t
from scipy.stats import ttest_rel

from infer.ensemble.scoring.comparison import Comparison

BASE = np.array([0.150, 0.140, 0.155, 0.145])


BETTER = BASE + 0.001 + np.array([0, 1, 0, 1]) * 1e-4


DRAWS = np.random.default_rng(0).normal(0.15, 0.002, 200)


def judged(fits: tuple[np.ndarray, np.ndarray], difference: float) -> Comparison:
    """A comparison whose patients give differences around `difference`, nearly all of one sign."""
    spread = np.random.default_rng(1).normal(difference, 0.001, len(DRAWS))
    return Comparison(np.stack(fits, axis=1), np.stack([DRAWS, DRAWS + spread], axis=1))


@pytest.mark.parametrize(
    ("fits", "difference", "verdict"),
    [
        ((BASE, BETTER), 0.005, "a difference"),
        ((BETTER, BASE), -0.005, "a difference"),
        ((BASE, BETTER), 0.0, "noise"),
        ((BASE, BETTER), -0.005, "noise"),
        ((BASE, BASE[::-1]), 0.005, "noise"),
        ((BASE[:1], BETTER[:1]), 0.005, "a difference"),
        ((BASE[:0], BETTER[:0]), -0.005, "a difference"),
        ((BASE[:0], BETTER[:0]), 0.0, "noise"),
    ],
)
def test_a_difference_takes_both_kinds_of_chance_and_one_direction(
    fits: tuple[np.ndarray, np.ndarray], difference: float, verdict: str
) -> None:
    found = judged(fits, difference)
    assert found.verdict == verdict == found.row()["verdict"]
    assert found.tested == (len(fits[0]) > 1)


def test_without_overlap_p_is_that_of_the_paired_t_test() -> None:
    found = judged((BASE, BETTER), 0.005)
    assert found.p == pytest.approx(ttest_rel(BETTER, BASE).pvalue)


def test_the_overlap_of_folds_adds_to_the_variance() -> None:
    """Differences 0, 1, 2 in three folds with half as many test rows as training rows.

    Mean 1, variance 1, corrected variance of the mean 1 / 3 + 1 / 2.
    """
    fits = np.stack([np.zeros(3), [0.0, 1.0, 2.0]], axis=1)
    draws = np.zeros((100, 2))
    found = Comparison(fits, draws, "folds", overlap=0.5)
    assert found.p == pytest.approx(2 * student_t.sf(1 / np.sqrt(1 / 3 + 1 / 2), 2))
    assert found.p > Comparison(fits, draws, "folds").p


def test_equal_differences_of_all_fits_are_certain() -> None:
    fits = np.stack([np.zeros(4), np.ones(4)], axis=1)
    assert Comparison(fits, np.zeros((100, 2)), "seeds").p == 0.0


def test_equally_good_learners_seldom_differ_by_the_folds() -> None:
    """400 draws of rows; in each, all plans test the same rows in different folds."""
    random = np.random.default_rng(0)
    corrected = plain = 0
    for _ in range(400):
        rows = random.standard_normal(200)
        plans = [random.permutation(200).reshape(5, 40) for _ in range(3)]
        differences = np.concatenate([rows[plan].mean(axis=1) for plan in plans])
        fits = np.stack([np.zeros(15), differences], axis=1)
        corrected += Comparison(fits, np.zeros((100, 2)), "folds", overlap=0.25).p < 0.05
        plain += Comparison(fits, np.zeros((100, 2)), "folds").p < 0.05
    assert corrected / 400 < 0.1
    assert plain / 400 > 0.2


def test_the_same_scores_have_no_difference_in_a_table() -> None:
    same = Comparison(np.stack([BASE, BASE], axis=1), np.stack([DRAWS, DRAWS], axis=1))
    assert same.p == 1.0
    assert set(same.row().values()) == {None}
