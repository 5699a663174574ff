"""The local outlier factor."""

import numpy as np
from sklearn.neighbors import LocalOutlierFactor

from isic.features.outlier import FLOOR, patient_lof


def test_the_outlier_factor_is_scikit_learns_and_finds_the_odd_one_out() -> None:
    rng = np.random.default_rng(0)
    # The first patient needs several blocks of distances, the third has fewer than 30 neighbors.
    sizes = (900, 60, 18, 2)
    measured = rng.standard_normal((sum(sizes), 5)).astype(np.float32)
    measured[907] = 12
    factor = patient_lof(measured, np.repeat(range(4), sizes))
    start = 0
    for size, neighbors in zip(sizes[:3], (30, 30, 17), strict=True):
        rows = slice(start, start + size)
        theirs = LocalOutlierFactor(n_neighbors=neighbors).fit(measured[rows].astype(np.float64))
        np.testing.assert_array_equal(
            factor[rows], theirs.negative_outlier_factor_.astype(np.float32)
        )
        start += size
    assert factor[900:960].argmin() == 7
    assert factor[start:].tolist() == [-1, -1]


def test_identical_lesions_have_a_finite_outlier_factor() -> None:
    measured = np.zeros((40, 3), dtype=np.float32)
    measured[-1] = 5
    factor = patient_lof(measured, np.zeros(40, dtype=np.int64))
    assert np.isfinite(factor).all()
    assert factor.min() >= FLOOR
