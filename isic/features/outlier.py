"""How unlike its patient's other lesions a lesion is: the local outlier factor, patient by patient."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from isic import schema
from isic.features.formulas import SOLUTIONS
from isic.machine import num_cores

NAME = "patient_lof"
SOURCE = f"{SOLUTIONS}; Breunig et al. 2000, LOF: identifying density-based local outliers"
MAX_NEIGHBORS = 30
MIN_LESIONS = 3
FLOOR = -1000.0
TINY = 1e-10
"""Added to a mean distance before it divides, as scikit-learn does: identical lesions then have a finite density."""
BLOCK = 2**18
"""Distances held at once by a thread: 2 MB, which a core's cache holds."""

COLUMNS = tuple(
    name
    for name in schema.NUMERIC
    if name not in {"age_approx", "tbp_lv_x", "tbp_lv_y", "tbp_lv_z", "tbp_lv_symm_2axis_angle"}
)
"""What the distance between two lesions is taken over: how they look, not where they are."""

Floats = NDArray[np.float64]


def patient_lof(measured: NDArray[np.float32], patient: NDArray[np.integer]) -> NDArray[np.float32]:
    """Returns each lesion's negative local outlier factor among its patient's lesions.

    The factor is about -1 for a lesion like its neighbours and lower for one that stands apart; -1 where the patient
    has fewer than three. What follows from the great density of identical lesions is cut at FLOOR. The values are
    those of scikit-learn's LocalOutlierFactor, whose every call costs more than a patient of few lesions does here.

    Args:
        measured: [N, D] normalised within the patient; NaN counts as the patient's mean, which is 0.
        patient: [N] codes, sorted.
    """
    factor = np.full(len(patient), -1.0, dtype=np.float32)
    filled = np.nan_to_num(measured, nan=0.0, posinf=0.0, neginf=0.0)
    bounds = np.flatnonzero(np.concatenate([[True], patient[1:] != patient[:-1], [True]])).tolist()
    groups = [slice(*ends) for ends in pairwise(bounds) if ends[1] - ends[0] >= MIN_LESIONS]
    groups.sort(key=lambda rows: rows.start - rows.stop)  # the largest first: it takes longest
    # One thread a patient: BLAS's own threads would share the cores with these, and wait for each other.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(num_cores()) as pool:
        for rows, part in zip(
            groups, pool.map(lambda rows: _one_patient(filled[rows]), groups), strict=True
        ):
            factor[rows] = part
    return np.maximum(factor, np.float32(FLOOR))


def _one_patient(measured: NDArray[np.float32]) -> Floats:
    distance, neighbor = _nearest(
        measured.astype(np.float64), min(len(measured) - 1, MAX_NEIGHBORS)
    )
    reachability = np.maximum(distance, distance.max(axis=1)[neighbor])
    density: Floats = 1 / (reachability.mean(axis=1) + TINY)
    factor: Floats = density[neighbor].mean(axis=1) / density
    return -factor


def _nearest(points: Floats, number: int) -> tuple[Floats, NDArray[np.intp]]:
    """Returns the distances to each point's nearest others and which they are, both [N, number], in no order."""
    half_square = (points * points).sum(axis=1) / 2
    distance = np.empty((len(points), number))
    neighbor = np.empty((len(points), number), dtype=np.intp)
    for start in range(0, len(points), step := max(1, BLOCK // len(points))):
        rows = np.arange(start, min(start + step, len(points)))
        # |a - b|^2 = 2 (|a|^2 / 2 + |b|^2 / 2 - ab); a row's own |a|^2 does not change which are its nearest.
        from_row = half_square - points[rows] @ points.T
        from_row[rows - start, rows] = np.inf
        nearest = np.argpartition(from_row, number - 1, axis=1)[:, :number]
        half = np.take_along_axis(from_row, nearest, axis=1) + half_square[rows, None]
        distance[rows], neighbor[rows] = np.sqrt(np.maximum(2 * half, 0)), nearest
    return distance, neighbor
