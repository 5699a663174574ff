"""Features of a lesion relative to its patient's other lesions, as a table of expressions.

They read row features and PATIENT_CODE; the table must be sorted by PATIENT_CODE.
"""

import polars as pl

from isic import schema
from isic.features.formulas import (
    ERR,
    LOCATION,
    NOTEBOOKS,
    OURS,
    ROW_NUMERIC,
    SITE,
    SOLUTIONS,
    Feature,
    ratio,
)

PATIENT_CODE = "_patient"

WITHIN: dict[str, list[str]] = {
    "patient": [PATIENT_CODE],
    "patient_site": [PATIENT_CODE, SITE],
    "patient_location": [PATIENT_CODE, LOCATION],
}
"""Keys of the lesions that a lesion is compared with. Blank sites count as one site."""

RANKED = (
    "clin_size_long_diam_mm",
    "tbp_lv_areaMM2",
    "tbp_lv_H",
    "tbp_lv_deltaLBnorm",
    "tbp_lv_color_std_mean",
    "tbp_lv_nevi_confidence",
    "tbp_lv_norm_border",
    "tbp_lv_norm_color",
)
"""One or two measurements each of size, hue, contrast, colour variation, nevus and border."""

EXTREMES = ("clin_size_long_diam_mm", "tbp_lv_areaMM2", "tbp_lv_perimeterMM")
Z_OUTLIER = 2.0


def zscore(column: pl.Expr, keys: list[str]) -> pl.Expr:
    """Return (x - mean) / (std + ERR) among rows with equal keys; a single lesion scores 0."""
    # The standard deviation of a single lesion is null.
    return (column - column.mean().over(keys)) / (column.std().over(keys).fill_null(0) + ERR)


def percentile(column: pl.Expr, keys: list[str]) -> pl.Expr:
    """Return mean rank / count among the rows with equal keys and a value, in (0, 1]."""
    return column.rank("average").over(keys) / column.count().over(keys)


def _zscores(within: str, source: str) -> tuple[Feature, ...]:
    return tuple(
        Feature(f"{name}_{within}_z", zscore(pl.col(name), WITHIN[within]), f"{within}_z", source)
        for name in ROW_NUMERIC
    )


def _ranks(names: tuple[str, ...], within: str) -> tuple[Feature, ...]:
    return tuple(
        Feature(
            f"{name}_{within}_rank",
            percentile(pl.col(name), WITHIN[within]),
            f"{within}_rank",
            SOLUTIONS,
        )
        for name in names
    )


def _extremes() -> tuple[Feature, ...]:
    keys = WITHIN["patient"]
    group = "patient_extreme"
    features = []
    for name in EXTREMES:
        column = pl.col(name)
        to_max = ratio(column, column.max().over(keys))
        to_min = ratio(column, column.min().over(keys))
        features.append(Feature(f"{name}_to_patient_max", to_max, group, SOLUTIONS))
        features.append(Feature(f"{name}_to_patient_min", to_min, group, SOLUTIONS))
    return tuple(features)


def _counts() -> tuple[Feature, ...]:
    group = "patient_count"
    features = []
    for within, keys in WITHIN.items():
        num_lesions = pl.len().over(keys)
        area_sum = pl.col("tbp_lv_areaMM2").sum().over(keys)
        features.append(Feature(f"{within}_num_lesions", num_lesions, group, SOLUTIONS))
        features.append(Feature(f"{within}_area_sum", area_sum, group, SOLUTIONS))
    return tuple(features)


def _outlier_count(within: str) -> Feature:
    keys = WITHIN[within]
    outlying = (zscore(pl.col(name), keys).abs() > Z_OUTLIER for name in schema.NUMERIC)
    count = pl.sum_horizontal(*outlying)
    return Feature(f"num_{within}_outliers", count, f"{within}_outliers", SOLUTIONS)


RELATIVE_FEATURES = (
    *_zscores("patient", NOTEBOOKS),
    *_ranks(RANKED, "patient"),
    *_extremes(),
    *_counts(),
    _outlier_count("patient"),
)
"""The relative features of the `engineered` set."""

EXTENDED_FEATURES = (
    *(
        Feature(f.name, f.expr.abs(), f.group, SOLUTIONS)
        for f in _zscores("patient_location", OURS)
        if f.name.startswith(("tbp_lv_", "clin_size"))
    ),
    *_ranks(RANKED, "patient_site"),
    *_ranks(RANKED, "patient_location"),
    _outlier_count("patient_location"),
)
"""Only in `extended`: absolute z-scores per body location, ranks per site and per location."""
