"""Values of the formulas by hand."""

import math

import numpy as np
import polars as pl
import pytest

from isic import schema
from isic.features import (
    compute,
)
from isic.features.formulas import NOTEBOOK_FORMULAS, SOLUTION_FORMULAS
from tests.support.tables import lesions


def value(table: pl.DataFrame, name: str, row: int = 0) -> float:
    return float(compute(table, [name])[name][row])


FORMULAS_BY_HAND = {
    "lesion_size_ratio": 2 / 4,
    "lesion_shape_index": 6 / 81,
    "hue_contrast": 8.0,
    "lesion_color_difference": math.sqrt(9 + 16 + 144),
    "border_complexity": 0.5 + 0.25,
    "color_uniformity": 1.5 / (0.75 + 1e-5),
    "position_distance_3d": 7.0,
    "consistency_symmetry_border": 0.25 * 0.5 / 0.75,
    "shape_complexity_index": 0.5 + 0.25 + 6 / 81,
    "color_contrast_index": 3 - 4 - 12 + 5,
    "log_lesion_area": math.log(7),
    "std_dev_contrast": math.sqrt(169 / 3),
    "lesion_orientation_3d": math.atan2(3, 2),
    "age_normalized_nevi_confidence_2": math.hypot(4, 60),
    "volume_approximation_3d": 6 * 7,
    "color_range": 12 + 4 + 2,
    "border_length_ratio": 9 / (2 * math.pi * math.sqrt(6 / math.pi)),
    "index_age_size_symmetry": 60 * 6 * 0.25,
    "position_angle_xz": math.atan2(6, 2),
    "area_diameter_ratio": 6 / 16,
}


@pytest.mark.parametrize("name", FORMULAS_BY_HAND)
def test_formulas_have_the_values_of_a_calculation_by_hand(name: str) -> None:
    row = {
        "age_approx": 60.0,
        "clin_size_long_diam_mm": 4.0,
        "tbp_lv_A": 20.0,
        "tbp_lv_Aext": 16.0,
        "tbp_lv_B": 25.0,
        "tbp_lv_Bext": 23.0,
        "tbp_lv_H": 50.0,
        "tbp_lv_Hext": 58.0,
        "tbp_lv_L": 40.0,
        "tbp_lv_Lext": 52.0,
        "tbp_lv_areaMM2": 6.0,
        "tbp_lv_color_std_mean": 1.5,
        "tbp_lv_deltaA": 3.0,
        "tbp_lv_deltaB": -4.0,
        "tbp_lv_deltaL": -12.0,
        "tbp_lv_deltaLBnorm": 5.0,
        "tbp_lv_minorAxisMM": 2.0,
        "tbp_lv_norm_border": 0.5,
        "tbp_lv_perimeterMM": 9.0,
        "tbp_lv_radial_color_std_max": 0.75,
        "tbp_lv_symm_2axis": 0.25,
        "tbp_lv_x": 2.0,
        "tbp_lv_y": 3.0,
        "tbp_lv_z": 6.0,
    }
    table = lesions(**{column: [number] for column, number in row.items()})
    assert value(table, name) == pytest.approx(FORMULAS_BY_HAND[name], rel=1e-6)


def test_zero_over_zero_is_zero_and_a_blank_stays_blank() -> None:
    zeros = lesions(tbp_lv_norm_border=[0.0], tbp_lv_norm_color=[0.0], tbp_lv_symm_2axis=[0.0])
    assert value(zeros, "consistency_symmetry_border") == 0
    assert value(zeros, "border_color_interaction_2") == 0
    names = ["normalized_lesion_size", "lesion_size_ratio", "num_blanks"]
    assert compute(lesions(age_approx=[None]), names).row(0)[1:] == (None, 1.0, 1.0)


def test_every_formula_is_finite_if_every_measurement_is_zero() -> None:
    zeros = lesions(**{name: [0.0, 0.0] for name in schema.NUMERIC})
    values = compute(zeros, (*NOTEBOOK_FORMULAS, *SOLUTION_FORMULAS)).drop(schema.ID)
    assert np.isfinite(values.to_numpy()).all()


def test_a_number_beyond_float32_is_blank() -> None:
    far = lesions(tbp_lv_x=[1e30])
    assert value(far, "position_distance_3d") == pytest.approx(1e30)
    beyond = lesions(tbp_lv_x=[1e300])
    assert compute(beyond, ["tbp_lv_x"])["tbp_lv_x"].to_list() == [None]
