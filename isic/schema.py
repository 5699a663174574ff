"""Columns of the challenge's tables, as data."""

import polars as pl

ID = "isic_id"
TARGET = "target"
PATIENT = "patient_id"

NUMERIC = (
    "age_approx",
    "clin_size_long_diam_mm",
    "tbp_lv_A",
    "tbp_lv_Aext",
    "tbp_lv_B",
    "tbp_lv_Bext",
    "tbp_lv_C",
    "tbp_lv_Cext",
    "tbp_lv_H",
    "tbp_lv_Hext",
    "tbp_lv_L",
    "tbp_lv_Lext",
    "tbp_lv_areaMM2",
    "tbp_lv_area_perim_ratio",
    "tbp_lv_color_std_mean",
    "tbp_lv_deltaA",
    "tbp_lv_deltaB",
    "tbp_lv_deltaL",
    "tbp_lv_deltaLB",
    "tbp_lv_deltaLBnorm",
    "tbp_lv_eccentricity",
    "tbp_lv_minorAxisMM",
    "tbp_lv_nevi_confidence",
    "tbp_lv_norm_border",
    "tbp_lv_norm_color",
    "tbp_lv_perimeterMM",
    "tbp_lv_radial_color_std_max",
    "tbp_lv_stdL",
    "tbp_lv_stdLExt",
    "tbp_lv_symm_2axis",
    "tbp_lv_symm_2axis_angle",
    "tbp_lv_x",
    "tbp_lv_y",
    "tbp_lv_z",
)
"""The 34 raw numbers of a row: two clinical ones, then `tbp_lv_*` in the file's order."""

CATEGORICAL = (
    "sex",
    "anatom_site_general",
    "image_type",
    "tbp_tile_type",
    "tbp_lv_location",
    "tbp_lv_location_simple",
    "attribution",
    "copyright_license",
)

TRAIN_ONLY_TEXT = (
    "lesion_id",
    "iddx_full",
    "iddx_1",
    "iddx_2",
    "iddx_3",
    "iddx_4",
    "iddx_5",
    "mel_mitotic_index",
)
TRAIN_ONLY_NUMERIC = ("mel_thick_mm", "tbp_lv_dnn_lesion_confidence")
TRAIN_ONLY = (TARGET, *TRAIN_ONLY_TEXT, *TRAIN_ONLY_NUMERIC)
"""Columns that the test table lacks; they are never features."""
AFTER_DIAGNOSIS = tuple(name for name in TRAIN_ONLY if name.startswith(("iddx_", "mel_")))
"""Columns that a pathologist's finding fills in."""

DTYPES: dict[str, pl.DataType] = {
    ID: pl.String(),
    TARGET: pl.Int8(),
    PATIENT: pl.String(),
    **{name: pl.Float64() for name in (*NUMERIC, *TRAIN_ONLY_NUMERIC)},
    **{name: pl.String() for name in (*CATEGORICAL, *TRAIN_ONLY_TEXT)},
}

TRAIN_ORDER = (
    "isic_id",
    "target",
    "patient_id",
    "age_approx",
    "sex",
    "anatom_site_general",
    "clin_size_long_diam_mm",
    "image_type",
    "tbp_tile_type",
    *NUMERIC[2:21],
    "tbp_lv_location",
    "tbp_lv_location_simple",
    *NUMERIC[21:],
    "attribution",
    "copyright_license",
    *TRAIN_ONLY_TEXT,
    *TRAIN_ONLY_NUMERIC,
)
"""The 55 columns of `train-metadata.csv` in file order; the test file lacks TRAIN_ONLY."""


def is_train_only(name: str) -> bool:
    """Return whether a column is one of TRAIN_ONLY, in whatever case it is written."""
    return name.lower() in TRAIN_ONLY
