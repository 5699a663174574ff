"""Features relative to the patient's other lesions."""

import math

import polars as pl
import pytest

from isic import schema
from isic.features import (
    FEATURES,
    SETS,
    compute,
)
from tests.support.tables import EXTENDED, lesions


def test_patient_features_by_hand() -> None:
    three = lesions(
        tbp_lv_areaMM2=[1.0, 2.0, 6.0],
        tbp_lv_H=[5.0, 5.0, 1.0],
        anatom_site_general=["a", "b", "b"],
    )
    names = ["tbp_lv_areaMM2_patient_z", "tbp_lv_H_patient_rank", "tbp_lv_areaMM2_to_patient_max"]
    names += [
        "tbp_lv_areaMM2_to_patient_min",
        "patient_num_lesions",
        "patient_site_num_lesions",
        "patient_site_area_sum",
    ]
    found = compute(three, names)
    std = math.sqrt((4 + 1 + 9) / 2)
    assert found[names[0]].to_list() == pytest.approx(
        [-2 / (std + 1e-5), -1 / (std + 1e-5), 3 / (std + 1e-5)]
    )
    assert found[names[1]].to_list() == pytest.approx([2.5 / 3, 2.5 / 3, 1 / 3])
    assert found[names[2]].to_list() == pytest.approx([1 / 6, 2 / 6, 1])
    assert found[names[3]].to_list() == [1, 2, 6]
    assert found[names[4]].to_list() == [3, 3, 3]
    assert found[names[5]].to_list() == [1, 2, 2]
    assert found[names[6]].to_list() == [1, 8, 8]


def test_a_lone_lesion_is_like_itself() -> None:
    one = compute(lesions(tbp_lv_H=[50.0]), SETS["engineered"])
    zscores = one.select(pl.col("^.*_patient_z$"))
    assert set(zscores.row(0)) == {0.0}
    assert one["patient_lof"][0] == -1
    assert one["tbp_lv_H_patient_rank"][0] == 1


def test_rows_without_a_patient_are_patients_of_their_own(table: pl.DataFrame) -> None:
    unknown = table.with_columns(pl.lit(None, dtype=pl.String).alias(schema.PATIENT))
    assert set(compute(unknown, ["patient_num_lesions"])["patient_num_lesions"]) == {1.0}


def test_the_patients_own_rows_do_change_something(
    table: pl.DataFrame, extended: pl.DataFrame
) -> None:
    patient = table[schema.PATIENT].mode()[0]
    first = table.filter(pl.col(schema.PATIENT) == patient)[schema.ID][0]
    without = compute(table.filter(pl.col(schema.ID) != first), EXTENDED)
    rest = extended.filter(pl.col(schema.ID) != first)
    moved = [name for name in EXTENDED if not without[name].equals(rest[name], null_equal=True)]
    assert len(moved) > 100
    assert {FEATURES[name].source for name in moved}.isdisjoint({"raw"})
