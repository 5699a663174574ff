"""Features of a lesion relative to the other lesions of its patient, as a table of expressions.

They take the row features as columns, and PATIENT_CODE, by which the table must be sorted.
"""

import polars as pl

from isic import schema
from isic.features.formulas import ERR, LOCATION, OURS, ROW_NUMERIC, SITE, SOLUTIONS, Feature, ratio

PATIENT_CODE = "_patient"

WITHIN: dict[str, list[str]] = {
    "patient": [PATIENT_CODE],
    "patient_site": [PATIENT_CODE, SITE],
    "patient_location": [PATIENT_CODE, LOCATION],
}
"""Among which lesions a lesion is looked at. Lesions with a blank site are one site."""

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
"""Size, hue, contrast, colour variation, nevus likeness and border: one measurement of each kind."""

EXTREMES = ("clin_size_long_diam_mm", "tbp_lv_areaMM2", "tbp_lv_perimeterMM")
Z_OUTLIER = 2.0


def zscore(column: pl.Expr, keys: list[str]) -> pl.Expr:
    """Returns (x - mean) / (std + ERR) among the rows with the same keys; a lone lesion has std 0 and score 0."""
    return (column - column.mean().over(keys)) / (column.std().over(keys).fill_null(0) + ERR)


def percentile(column: pl.Expr, keys: list[str]) -> pl.Expr:
    """Returns the rank among the rows with the same keys that have a value, in (0, 1]; ties share their mean rank."""
    return column.rank("average").over(keys) / column.count().over(keys)


def _zscores(where: str, source: str) -> tuple[Feature, ...]:
    return tuple(
        Feature(f"{name}_{where}_z", zscore(pl.col(name), WITHIN[where]), f"{where}_z", source)
        for name in ROW_NUMERIC
    )


def _ranks(names: tuple[str, ...], where: str) -> tuple[Feature, ...]:
    return tuple(
        Feature(
            f"{name}_{where}_rank",
            percentile(pl.col(name), WITHIN[where]),
            f"{where}_rank",
            SOLUTIONS,
        )
        for name in names
    )


def _extremes() -> tuple[Feature, ...]:
    keys = WITHIN["patient"]
    return tuple(
        Feature(
            f"{name}_to_patient_{extreme}",
            ratio(pl.col(name), expr.over(keys)),
            "patient_extreme",
            SOLUTIONS,
        )
        for name in EXTREMES
        for extreme, expr in (("max", pl.col(name).max()), ("min", pl.col(name).min()))
    )


def _counts() -> tuple[Feature, ...]:
    area = pl.col("tbp_lv_areaMM2")
    return tuple(
        Feature(f"{where}_{what}", expr.over(keys), "patient_count", SOLUTIONS)
        for where, keys in WITHIN.items()
        for what, expr in (("num_lesions", pl.len()), ("area_sum", area.sum()))
    )


def _outlier_count(where: str) -> Feature:
    outlying = (zscore(pl.col(name), WITHIN[where]).abs() > Z_OUTLIER for name in schema.NUMERIC)
    return Feature(
        f"num_{where}_outliers", pl.sum_horizontal(*outlying), f"{where}_outliers", SOLUTIONS
    )


RELATIVE_FEATURES = (
    *_zscores("patient", "public ISIC 2024 notebooks"),
    *_ranks(RANKED, "patient"),
    *_extremes(),
    *_counts(),
    _outlier_count("patient"),
)
"""The default ones."""

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
"""Those in the extended set: the size of the deviation at the same body location, and ranks at site and location."""
