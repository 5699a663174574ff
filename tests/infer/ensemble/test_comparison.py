import numpy as np
import pytest

from infer.ensemble.comparison import Comparison

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


def test_the_same_scores_have_no_difference_in_a_table() -> None:
    same = Comparison(np.stack([BASE, BASE], axis=1), np.stack([DRAWS, DRAWS], axis=1))
    assert same.p == 1.0
    assert set(same.row().values()) == {None}
