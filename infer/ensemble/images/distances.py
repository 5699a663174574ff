"""Distances of a lesion to its patient's others in the features of a frozen network.

A lesion that looks unlike the patient's others, an ugly duckling, is more often malignant
(Grob and Bonerandi 1998, Archives of Dermatology 134:103).
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from isic.arrays import Floats
from isic.features.outlier import BLOCK, Points, by_patient, patient_lof
from isic.features.relative import PATIENT_CODE

DISTANCES = "frozen_distances"
MEASURES = ("nearest", "mean", "farthest", "center", "lof")
"""Distances to the nearest of the others, the mean over them, to the farthest and to the mean of
their features; and the local outlier factor."""


def distance_columns(network: str) -> tuple[str, ...]:
    return tuple(f"frozen_distance_{measure}.{network}" for measure in MEASURES)


@dataclass(frozen=True)
class PatientDistances:
    """Where lesions lie in a frozen network's features, and the columns made of that."""

    network: str
    points: pl.DataFrame
    """[N, C] Float32, null for an unreadable image."""
    lesions: pl.DataFrame
    """The result of `group_lesions`."""

    def columns(self) -> pl.DataFrame:
        """Return [N] Float32 the MEASURES; null for an only lesion and an unreadable image."""
        rows = self.lesions["_row"].to_numpy()
        points = self.points.to_numpy().astype(np.float64)[rows]
        is_read = np.isfinite(points).all(axis=1)
        found = np.full((len(rows), len(MEASURES)), np.nan, np.float32)
        patient = self.lesions[PATIENT_CODE].to_numpy()
        found[rows[is_read]] = measure_distances(points[is_read], patient[is_read])
        return pl.DataFrame(found, distance_columns(self.network)).fill_nan(None)


def measure_distances(points: Points, patient: NDArray[np.integer]) -> NDArray[np.float32]:
    """Return [N, 5] the MEASURES, NaN for a patient's only lesion.

    Args:
        points: [N, C].
        patient: [N] codes, sorted.
    """
    found = np.full((len(points), len(MEASURES)), np.nan, np.float32)
    factor = patient_lof(points, patient)
    for rows, distances in by_patient(_of_one_patient, points, patient, least=2):
        found[rows] = np.column_stack([distances, factor[rows]])
    return found


def _of_one_patient(points: Points) -> Floats:
    """Return [n, 4] the distances of n lesions to the others, without the outlier factor."""
    number = len(points)
    found = np.empty((number, 4))
    step = max(1, BLOCK // number)
    for start in range(0, number, step):
        part = slice(start, start + step)
        distance = cdist(points[part], points)
        found[part, 1] = distance.sum(axis=1) / (number - 1)
        found[part, 2] = distance.max(axis=1)
        index = np.arange(len(distance))
        distance[index, start + index] = np.inf  # a lesion is not its own neighbor
        found[part, 0] = distance.min(axis=1)
    # The mean of the others is farther away than that of all, by this factor.
    to_mean = np.linalg.norm(points - points.mean(axis=0), axis=1)
    found[:, 3] = to_mean * number / (number - 1)
    return found
