"""How unlike its patient's other lesions a lesion is: the local outlier factor, patient by patient."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.neighbors import LocalOutlierFactor
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from isic import schema
from isic.features.formulas import SOLUTIONS
from isic.machine import cores

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
    bounds = np.flatnonzero(np.concatenate([[True], patient[1:] != patient[:-1], [True]])).tolist()
    groups = [slice(*ends) for ends in pairwise(bounds) if ends[1] - ends[0] >= MIN_LESIONS]
    groups.sort(key=lambda rows: rows.start - rows.stop)  # the largest first: it takes longest
    # One thread a patient: within one, scikit-learn's threads wait for each other, on a busy machine for five times as
    # long as they work. Its loops take their number of threads from the thread that calls, BLAS from the process.
    single = partial(threadpool_limits, 1, "openmp")
    with (
        warnings.catch_warnings(),
        threadpool_limits(1, "blas"),
        ThreadPoolExecutor(len(cores()), initializer=single) as pool,
    ):
        warnings.simplefilter("ignore", UserWarning)  # "Duplicate values": the cut below is what we make of them
        for rows, part in zip(groups, pool.map(lambda rows: _one_patient(filled[rows]), groups), strict=True):
            factor[rows] = part
    return np.maximum(factor, np.float32(FLOOR))


def _one_patient(measured: NDArray[np.float32]) -> NDArray[np.float64]:
    model = LocalOutlierFactor(n_neighbors=min(len(measured) - 1, MAX_NEIGHBORS))
    with config_context(assume_finite=True, skip_parameter_validation=True):  # a quarter of a small patient's time
        return np.asarray(model.fit(measured).negative_outlier_factor_)
