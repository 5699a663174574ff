"""The number of lesions per patient, in the training table and in a table to score.

Features relative to a patient compare a lesion with the patient's others in the same table. Without
others they are constants, which boosters have hardly seen in training.
"""

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from isic import schema
from isic.arrays import codes
from isic.metadata import with_patient

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 100)
FEW = 5
"""The percentile of training patients under which a patient has few lesions."""


def count_lesions(metadata: pl.DataFrame) -> NDArray[np.int64]:
    """Return [P] the number of rows of each patient, in the order of their names."""
    return np.bincount(patient_codes(metadata))


def patient_codes(metadata: pl.DataFrame) -> NDArray[np.int64]:
    """Return [N] the number of each row's patient, 0 to P - 1 in the order of their names."""
    return codes(with_patient(metadata)[schema.PATIENT])


def describe_lesion_counts(metadata: pl.DataFrame) -> dict[str, Any]:
    """Return the number of `patients`, and `percentiles` of the lesions per patient."""
    counts = count_lesions(metadata)
    values = np.percentile(counts, PERCENTILES, method="inverted_cdf").tolist()
    return {
        "patients": len(counts),
        "percentiles": {str(key): value for key, value in zip(PERCENTILES, values, strict=True)},
    }


def few_lesions_warning(metadata: pl.DataFrame, training: dict[str, Any]) -> str | None:
    """Return a warning of patients with fewer lesions than nearly all in training, if any.

    `training` is the result of `describe_lesion_counts`.
    """
    counts = count_lesions(metadata)
    least = fewest_usual(training)
    few = int((counts < least).sum())
    if not few:
        return None
    return (
        f"{few:,} of the {len(counts):,} patients have fewer than {least:,} lesions, "
        f"percentile {FEW} of the {training['patients']:,} training patients (median "
        f"{training['percentiles']['50']:,}); this ensemble compares a lesion with the patient's "
        "others, so these patients' scores are unreliable"
    )


def has_few_lesions(metadata: pl.DataFrame, training: dict[str, Any]) -> NDArray[np.bool_]:
    """Return [N] whether a row's patient has fewer lesions than nearly all in training."""
    counts = with_patient(metadata).select(pl.len().over(schema.PATIENT)).to_series().to_numpy()
    few: NDArray[np.bool_] = counts < fewest_usual(training)
    return few


def fewest_usual(training: dict[str, Any]) -> int:
    """Return the number of lesions under which a patient has few."""
    return int(training["percentiles"][str(FEW)])
