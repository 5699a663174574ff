"""Feature values by hand, and their independence of labels, other patients and row order."""

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from isic import schema
from isic.features import (
    FEATURES,
    SETS,
    compute,
    expand,
    needed_columns,
)
from isic.features.formulas import NOTEBOOK_FORMULAS
from isic.runtime.errors import UserError
from tests.support.tables import EXTENDED


def same(left: pl.DataFrame, right: pl.DataFrame) -> bool:
    """Return whether two tables are equal bit for bit, nulls included."""
    return left.equals(right, null_equal=True)


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
        cwd=Path(__file__).parents[3],
        check=True,
    )
    assert same(pl.read_parquet(tmp_path / "features.parquet"), extended)


def test_labels_change_nothing(table: pl.DataFrame, extended: pl.DataFrame) -> None:
    flipped = table.with_columns(target=1 - pl.col(schema.TARGET), iddx_1=pl.lit("Malignant"))
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


@pytest.mark.parametrize("column", schema.TRAIN_ONLY)
def test_a_column_of_training_tables_is_never_a_feature(column: str) -> None:
    with pytest.raises(UserError, match=f"{column} exists only in the training table"):
        expand(["raw", column])
    assert column not in needed_columns(FEATURES)


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
