"""How unlike its patient's other lesions a lesion is: the local outlier factor, patient by patient."""

import warnings
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import LocalOutlierFactor

from isic import schema
from isic.features.formulas import SOLUTIONS

NAME = "patient_lof"
SOURCE = f"{SOLUTIONS}; Breunig et al. 2000, LOF: identifying density-based local outliers"
MAX_NEIGHBORS = 30
MIN_LESIONS = 3
FLOOR = -1000.0

COLUMNS = tuple(
    name
    for name in schema.NUMERIC
    if name not in {"age_approx", "tbp_lv_x", "tbp_lv_y", "tbp_lv_z", "tbp_lv_symm_2axis_angle"}
)
"""What the distance between two lesions is taken over: how they look, not where they are."""


def patient_lof(measured: NDArray[np.float32], patient: NDArray[np.integer]) -> NDArray[np.float32]:
    """Returns each lesion's negative local outlier factor among its patient's lesions.

    The factor is about -1 for a lesion like its neighbours and lower for one that stands apart; -1 where the patient
    has fewer than three. Identical lesions have infinite density; what follows is cut at FLOOR.

    Args:
        measured: [N, D] normalised within the patient; NaN counts as the patient's mean, which is 0.
        patient: [N] codes, sorted.
    """
    factor = np.full(len(patient), -1.0, dtype=np.float32)
    filled = np.nan_to_num(measured, nan=0.0, posinf=0.0, neginf=0.0)
    bounds = np.flatnonzero(np.concatenate([[True], patient[1:] != patient[:-1], [True]]))
    for start, stop in pairwise(bounds.tolist()):
        if stop - start < MIN_LESIONS:
            continue
        model = LocalOutlierFactor(n_neighbors=min(stop - start - 1, MAX_NEIGHBORS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "Duplicate values": the cut below is what we make of them
            factor[start:stop] = model.fit(filled[start:stop]).negative_outlier_factor_
    return np.maximum(factor, np.float32(FLOOR))
