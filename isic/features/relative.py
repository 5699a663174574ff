"""Features of a lesion relative to its patient's other lesions, as a table of expressions.

They read row features and PATIENT_CODE; the table must be sorted by PATIENT_CODE.
"""

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from isic import schema
from isic.features.formulas import (
    ERR,
    LOCATION,
    NOTEBOOKS,
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


def distance(column: pl.Expr, keys: list[str]) -> pl.Expr:
    """Return the absolute `zscore`."""
    return zscore(column, keys).abs()


def percentile(column: pl.Expr, keys: list[str]) -> pl.Expr:
    """Return mean rank / count among the rows with equal keys and a value, in (0, 1]."""
    return column.rank("average").over(keys) / column.count().over(keys)


def to_largest(column: pl.Expr, keys: list[str]) -> pl.Expr:
    """Return the ratio to the largest value among the rows with equal keys."""
    return ratio(column, column.max().over(keys))


def to_smallest(column: pl.Expr, keys: list[str]) -> pl.Expr:
    """Return the ratio to the smallest value among the rows with equal keys."""
    return ratio(column, column.min().over(keys))


@dataclass(frozen=True)
class Form:
    """A way to compare a number with the patient's other lesions."""

    within: str
    """The rows to compare with, of WITHIN."""
    compare: Callable[[pl.Expr, list[str]], pl.Expr]

    def of(self, name: str) -> pl.Expr:
        """Return the expression for a column."""
        return self.compare(pl.col(name), WITHIN[self.within])


FORMS = {
    "patient_z": Form("patient", zscore),
    "patient_location_z": Form("patient_location", distance),
    "patient_rank": Form("patient", percentile),
    "patient_site_rank": Form("patient_site", percentile),
    "patient_location_rank": Form("patient_location", percentile),
    "to_patient_max": Form("patient", to_largest),
    "to_patient_min": Form("patient", to_smallest),
}
"""By the ending of a relative feature's name."""


def _zscores(within: str, source: str) -> tuple[Feature, ...]:
    return tuple(
        Feature(f"{name}_{within}_z", FORMS[f"{within}_z"].of(name), f"{within}_z", source)
        for name in ROW_NUMERIC
    )


def _ranks(names: tuple[str, ...], within: str) -> tuple[Feature, ...]:
    return tuple(
        Feature(
            f"{name}_{within}_rank",
            FORMS[f"{within}_rank"].of(name),
            f"{within}_rank",
            SOLUTIONS,
        )
        for name in names
    )


def _extremes() -> tuple[Feature, ...]:
    return tuple(
        Feature(f"{name}_{form}", FORMS[form].of(name), "patient_extreme", SOLUTIONS)
        for name in EXTREMES
        for form in ("to_patient_max", "to_patient_min")
    )


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
        f
        for f in _zscores("patient_location", SOLUTIONS)
        if f.name.startswith(("tbp_lv_", "clin_size"))
    ),
    *_ranks(RANKED, "patient_site"),
    *_ranks(RANKED, "patient_location"),
    _outlier_count("patient_location"),
)
"""Only in `extended`: absolute z-scores per body location, ranks per site and per location."""
