"""Feature values by hand, and their independence of labels, other patients and row order."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.neighbors import LocalOutlierFactor

from isic import features, schema
from isic.features import (
    FEATURES,
    SETS,
    Encoding,
    compute,
    expand,
    feature_sets,
    feature_table,
    fit_encoding,
    needed_columns,
    relative_to_patient,
)
from isic.features.formulas import NOTEBOOK_FORMULAS, SOLUTION_FORMULAS, ratio
from isic.features.outlier import FLOOR, patient_lof
from isic.runtime.errors import UserError
from isic.synth.rows import draw_rows

EXTENDED = SETS["extended"]


def drawn(num_rows: int = 240, num_patients: int = 12, seed: int = 0) -> pl.DataFrame:
    """A synthetic table whose patients have from one to many lesions."""
    ids = [f"ISIC_{row:07d}" for row in range(num_rows)]
    patients = [f"IP_{row:07d}" for row in range(num_patients)]
    return draw_rows(ids, patients, num_rows // 10, np.random.default_rng(seed)).table


@pytest.fixture(scope="module")
def table() -> pl.DataFrame:
    return drawn()


@pytest.fixture(scope="module")
def extended(table: pl.DataFrame) -> pl.DataFrame:
    return compute(table, EXTENDED)


def same(left: pl.DataFrame, right: pl.DataFrame) -> bool:
    """Returns whether two tables are equal bit for bit, nulls included."""
    return left.equals(right, null_equal=True)


def value(table: pl.DataFrame, name: str, row: int = 0) -> float:
    return float(compute(table, [name])[name][row])


def lesions(**columns: list[float] | list[str] | list[None]) -> pl.DataFrame:
    """Returns rows of one patient: the given columns, and plain values in all others."""
    num_rows = len(next(iter(columns.values())))
    plain = {name: [1.0] * num_rows for name in schema.NUMERIC} | {
        name: ["a"] * num_rows for name in schema.CATEGORICAL
    }
    ids = {
        schema.ID: [f"ISIC_{row}" for row in range(num_rows)],
        schema.PATIENT: ["IP_1"] * num_rows,
    }
    return pl.DataFrame(
        ids | plain | columns,
        schema_overrides={c: schema.DTYPES[c] for c in columns if c in schema.DTYPES},
    )


def test_the_sets_have_the_sizes_they_are_known_for() -> None:
    assert len(NOTEBOOK_FORMULAS) == 42
    assert len(SETS["numeric"]) == 34
    assert len(SETS["raw"]) == 42
    assert len(SETS["engineered"]) == 200
    assert set(SETS["raw"]) < set(SETS["engineered"]) < set(EXTENDED)
    assert {f"{name}_patient_z" for name in (*schema.NUMERIC, *NOTEBOOK_FORMULAS)} < set(
        SETS["engineered"]
    )


def test_features_are_float32_or_text_and_never_nan(extended: pl.DataFrame) -> None:
    assert set(extended.dtypes) == {pl.Float32, pl.String}
    numbers = extended.select(pl.col(pl.Float32))
    assert numbers.select(pl.all().is_finite().all()).row(0) == (True,) * numbers.width


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


def test_every_formula_is_finite_where_every_measurement_is_zero() -> None:
    zeros = lesions(**{name: [0.0, 0.0] for name in schema.NUMERIC})
    values = compute(zeros, (*NOTEBOOK_FORMULAS, *SOLUTION_FORMULAS)).drop(schema.ID)
    assert np.isfinite(values.to_numpy()).all()


def test_a_number_beyond_float32_is_blank() -> None:
    far = lesions(tbp_lv_x=[1e30])
    assert value(far, "position_distance_3d") == pytest.approx(1e30)
    beyond = lesions(tbp_lv_x=[1e300])
    assert compute(beyond, ["tbp_lv_x"])["tbp_lv_x"].to_list() == [None]


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


def test_the_outlier_factor_is_scikit_learns_and_finds_the_odd_one_out() -> None:
    rng = np.random.default_rng(0)
    # The first patient needs several blocks of distances, the third has fewer than 30 neighbors.
    sizes = (900, 60, 18, 2)
    measured = rng.standard_normal((sum(sizes), 5)).astype(np.float32)
    measured[907] = 12
    factor = patient_lof(measured, np.repeat(range(4), sizes))
    start = 0
    for size, neighbors in zip(sizes[:3], (30, 30, 17), strict=True):
        rows = slice(start, start + size)
        theirs = LocalOutlierFactor(n_neighbors=neighbors).fit(measured[rows].astype(np.float64))
        np.testing.assert_array_equal(
            factor[rows], theirs.negative_outlier_factor_.astype(np.float32)
        )
        start += size
    assert factor[900:960].argmin() == 7
    assert factor[start:].tolist() == [-1, -1]


def test_identical_lesions_have_a_finite_outlier_factor() -> None:
    measured = np.zeros((40, 3), dtype=np.float32)
    measured[-1] = 5
    factor = patient_lof(measured, np.zeros(40, dtype=np.int64))
    assert np.isfinite(factor).all()
    assert factor.min() >= FLOOR


def test_the_order_of_rows_changes_nothing(table: pl.DataFrame, extended: pl.DataFrame) -> None:
    shuffled = table.sample(fraction=1, shuffle=True, seed=5)
    again = compute(shuffled, EXTENDED)
    assert again[schema.ID].to_list() == shuffled[schema.ID].to_list()
    assert same(again.sort(schema.ID), extended.sort(schema.ID))


def test_the_number_of_threads_changes_nothing(
    table: pl.DataFrame, extended: pl.DataFrame, tmp_path: Path
) -> None:
    """In a new process, because Polars fixes its number of threads on import."""
    assert pl.thread_pool_size() != 3, "this test must use another number"
    table.write_parquet(tmp_path / "table.parquet")
    script = (
        "import sys, polars as pl; from isic.features import SETS, compute; "
        "assert pl.thread_pool_size() == 3; "
        "compute(pl.read_parquet(sys.argv[1]), SETS['extended']).write_parquet(sys.argv[2])"
    )
    command = [
        sys.executable,
        "-c",
        script,
        tmp_path / "table.parquet",
        tmp_path / "features.parquet",
    ]
    subprocess.run(
        command,
        env=os.environ | {"POLARS_MAX_THREADS": "3"},
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert same(pl.read_parquet(tmp_path / "features.parquet"), extended)


def test_labels_change_nothing(table: pl.DataFrame, extended: pl.DataFrame) -> None:
    flipped = table.with_columns(1 - pl.col(schema.TARGET), pl.lit("Malignant").alias("iddx_1"))
    assert same(compute(flipped, EXTENDED), extended)
    assert same(compute(table.drop(schema.TRAIN_ONLY), EXTENDED), extended)


def test_other_patients_change_nothing(table: pl.DataFrame, extended: pl.DataFrame) -> None:
    kept = table[schema.PATIENT].unique().sort()[:5].implode()
    others = pl.col(schema.PATIENT).is_in(kept).not_()
    changed = table.with_columns(
        pl.when(others).then(pl.col(c) * 3 + 1).otherwise(c).alias(c) for c in schema.NUMERIC
    )
    mine = table.select(others.not_()).to_series()
    assert same(compute(changed, EXTENDED).filter(mine), extended.filter(mine))
    assert same(compute(table.filter(mine), EXTENDED), extended.filter(mine))
    assert not same(compute(changed, EXTENDED), extended)


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


@pytest.mark.parametrize("column", schema.TRAIN_ONLY)
def test_a_column_of_training_tables_is_never_a_feature(column: str) -> None:
    with pytest.raises(UserError, match=f"{column} exists only in the training table"):
        expand(["raw", column])
    assert column not in needed_columns(FEATURES)


def test_an_own_formula_is_a_feature_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    formula = ratio(pl.col("clin_size_long_diam_mm"), pl.col("age_approx"))
    table = feature_table({"my_feature": formula})
    monkeypatch.setattr(features, "FEATURES", table)
    monkeypatch.setattr(features, "SETS", feature_sets(table))
    assert features.SETS == SETS
    assert set(table) - set(FEATURES) == {"my_feature"}, "no z-score of it"
    names = expand(["engineered", "my_feature"])
    assert names == (*SETS["engineered"], "my_feature")
    assert needed_columns(["my_feature"]) == ("age_approx", "clin_size_long_diam_mm")
    assert not relative_to_patient(["my_feature"])
    two = lesions(clin_size_long_diam_mm=[3.0, 4.0], age_approx=[60.0, None])
    computed = compute(two, names)
    assert computed.columns == [schema.ID, *names]
    assert computed["my_feature"].to_list() == [pytest.approx(0.05), None]
    assert same(computed.drop("my_feature"), compute(two, SETS["engineered"]))


@pytest.mark.parametrize("name", ["tbp_lv_H", "border_complexity", "patient_z", "raw", "a b"])
def test_an_own_formula_needs_a_new_name(name: str) -> None:
    with pytest.raises(ValueError, match="rename it"):
        feature_table({name: pl.col("age_approx") + 1})


@pytest.mark.parametrize("column", ["target", "patient_id", "border_complexity"])
def test_an_own_formula_reads_raw_features_only(column: str) -> None:
    with pytest.raises(ValueError, match=f"my_feature reads {column}"):
        feature_table({"my_feature": pl.col(column) + pl.col("age_approx")})


def test_unknown_features_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match='unknown features "enginered", did you mean "engineered"'):
        expand(["enginered"])


@pytest.mark.parametrize(
    ("column", "features"), [("tbp_lv_H", "raw"), ("patient_id", "engineered"), ("sex", "raw")]
)
def test_a_missing_column_is_named(table: pl.DataFrame, column: str, features: str) -> None:
    with pytest.raises(UserError, match=f"lacks the column {column}"):
        compute(table.drop(column), SETS[features])


def test_a_column_that_no_feature_needs_may_be_missing(table: pl.DataFrame) -> None:
    assert len(compute(table.select(schema.ID, *schema.NUMERIC), SETS["numeric"])) == len(table)


def test_codes_follow_frequency_and_what_is_unseen_is_a_blank() -> None:
    text = ["b", "a", "b", None, "c", "a", "b"]
    features = pl.DataFrame(
        {"sex": text, "age_approx": pl.Series([None, 1, 2, 3, 4, None, 10], dtype=pl.Float32)}
    )
    encoding = fit_encoding(features, ("age_approx", "sex"))
    new = pl.DataFrame(
        {"sex": ["b", "a", "c", "new", None], "age_approx": pl.Series([None] * 5, dtype=pl.Float32)}
    )
    matrix = encoding.transform(new)
    assert matrix.dtype == np.float32
    assert matrix.flags.c_contiguous
    assert matrix[:, 1].tolist() == [0, 1, 2, -1, -1]
    assert matrix[:, 0].tolist() == [3.0] * 5


def test_a_column_blank_in_every_training_row_is_zero() -> None:
    features = pl.DataFrame(
        {"sex": [None], "age_approx": [None]}, schema={"sex": pl.String, "age_approx": pl.Float32}
    )
    encoding = fit_encoding(features, ("age_approx", "sex"))
    assert encoding.transform(features).tolist() == [[0, -1]]
    assert encoding.transform(features.with_columns(sex=pl.lit("male"))).tolist() == [[0, -1]]


def test_an_encoding_survives_its_file_form_bit_for_bit(extended: pl.DataFrame) -> None:
    encoding = fit_encoding(extended, EXTENDED)
    again = Encoding.from_json(EXTENDED, encoding.to_json())
    np.testing.assert_array_equal(again.transform(extended), encoding.transform(extended))
