"""Principal components."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from isic.arrays import Floats

BLOCK_ROWS = 8192
"""Rows that are in memory as float64."""


@dataclass(frozen=True)
class Components:
    """The directions in which some features vary most."""

    center: Floats
    """[D] the mean."""
    directions: Floats
    """[D, C] unit vectors, the largest coefficient of each positive; in the order of variances."""
    variances: Floats
    """[C] along the directions, from the largest on."""
    total_variance: float
    """Along all D directions."""


def principal_components(features: NDArray[np.floating], number: int) -> Components:
    """Find the first `number` principal components, at most D, of features [N, D]."""
    center = features.mean(axis=0, dtype=np.float64)
    width = len(center)
    covariance = np.zeros((width, width))
    # The bytes of a decomposition depend on the number of BLAS threads.
    with threadpool_limits(1, "blas"):
        for start in range(0, len(features), BLOCK_ROWS):
            centred = features[start : start + BLOCK_ROWS] - center
            covariance += centred.T @ centred / len(features)
        kept = (max(width - number, 0), width - 1)
        variances, directions = eigh(covariance, subset_by_index=kept)
    variances, directions = np.maximum(variances[::-1], 0), directions[:, ::-1]
    # The sign of a direction is arbitrary.
    largest_at = np.abs(directions).argmax(axis=0)[None]
    directions = directions * np.sign(np.take_along_axis(directions, largest_at, axis=0))
    return Components(center, directions, variances, float(covariance.trace()))
