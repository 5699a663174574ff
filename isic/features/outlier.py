"""Local outlier factor of each lesion among its patient's lesions."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from isic import schema
from isic.arrays import Floats
from isic.features.formulas import SOLUTIONS
from isic.runtime.machine import num_cores

Points = NDArray[np.floating]
"""[N, D]."""

NAME = "patient_lof"
SOURCE = f"{SOLUTIONS}; Breunig et al. 2000, LOF: identifying density-based local outliers"
MAX_NEIGHBORS = 30
MIN_LESIONS = 3
FLOOR = -1000.0
TINY = 1e-10
"""Added to a mean distance, as in scikit-learn, to keep densities finite."""
# 2 MB, which fits the cache of a core.
BLOCK = 2**18
"""Distances per thread at a time."""

OUTLIER_COLUMNS = tuple(
    name
    for name in schema.NUMERIC
    if name not in {"age_approx", "tbp_lv_x", "tbp_lv_y", "tbp_lv_z", "tbp_lv_symm_2axis_angle"}
)
"""Columns that define the distance between two lesions: appearance, not position."""


def patient_lof(
    measured: NDArray[np.floating], patient: NDArray[np.integer]
) -> NDArray[np.float32]:
    """Return each lesion's negative local outlier factor among its patient's lesions.

    About -1 for a lesion like its neighbors, lower for an outlier, at least FLOOR, and -1 if the
    patient has fewer than MIN_LESIONS. Equal to scikit-learn's LocalOutlierFactor.

    Args:
        measured: [N, D], normalised per patient; NaN counts as the patient's mean, 0.
        patient: [N] codes, sorted.

    Returns:
        [N] float32.
    """
    factor = np.full(len(patient), -1.0, dtype=np.float32)
    filled = np.nan_to_num(measured, nan=0.0, posinf=0.0, neginf=0.0)
    for rows, part in by_patient(_one_patient, filled, patient, MIN_LESIONS):
        factor[rows] = part
    return np.maximum(factor, np.float32(FLOOR))  # identical lesions have a huge density


def by_patient(
    function: Callable[[Points], Floats],
    points: Points,
    patient: NDArray[np.integer],
    least: int,
) -> Iterator[tuple[slice, Floats]]:
    """Yield the rows of each patient of at least `least` lesions and the function of their points.

    Args:
        points: [N, D].
        patient: [N] codes, sorted.
    """
    starts = np.flatnonzero(np.append(True, patient[1:] != patient[:-1])).tolist()
    groups = [slice(start, end) for start, end in pairwise([*starts, len(patient)])]
    groups = [rows for rows in groups if rows.stop - rows.start >= least]
    groups.sort(key=lambda rows: rows.start - rows.stop)  # largest first: it takes longest
    # Not by scikit-learn, whose overhead per call exceeds the work for a small patient. One thread
    # per patient; BLAS threads on top of these would compete for the same cores.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(num_cores()) as pool:
        yield from zip(groups, pool.map(lambda rows: function(points[rows]), groups), strict=True)


def _one_patient(measured: Points) -> Floats:
    num_neighbors = min(len(measured) - 1, MAX_NEIGHBORS)
    distance, neighbor = _nearest(measured.astype(np.float64), num_neighbors)
    # The paper's reachability distance: at least the neighbor's distance to its own k-th neighbor.
    reachability = np.maximum(distance, distance.max(axis=1)[neighbor])
    density: Floats = 1 / (reachability.mean(axis=1) + TINY)
    factor: Floats = density[neighbor].mean(axis=1) / density
    return -factor


def _nearest(points: Floats, number: int) -> tuple[Floats, NDArray[np.intp]]:
    """Return distances and indices of each point's nearest others, [N, number], unordered."""
    half_square = (points * points).sum(axis=1) / 2
    distance = np.empty((len(points), number))
    neighbor = np.empty((len(points), number), dtype=np.intp)
    step = max(1, BLOCK // len(points))
    for start in range(0, len(points), step):
        rows = np.arange(start, min(start + step, len(points)))
        # |a - b|^2 / 2 = |a|^2 / 2 + |b|^2 / 2 - ab. The term |a|^2 / 2 is the same for a whole
        # row and does not change its order, so it is added after the selection.
        from_row = half_square - points[rows] @ points.T
        from_row[rows - start, rows] = np.inf  # a point is not its own neighbor
        nearest = np.argpartition(from_row, number - 1, axis=1)[:, :number]
        half = np.take_along_axis(from_row, nearest, axis=1) + half_square[rows, None]
        distance[rows] = np.sqrt(np.maximum(2 * half, 0))  # rounding can make it negative
        neighbor[rows] = nearest
    return distance, neighbor
