from pathlib import Path

import polars as pl
import pytest

from isic import schema
from isic.folds import read_folds
from isic.group_folds import draw_group_folds
from isic.runtime.errors import UserError
from tests.support.commands import Cli
from tests.support.datasets import small_table

GROUP = "attribution"


def hospital_table(sizes: tuple[int, ...] = (300, 120, 90, 60, 30)) -> pl.DataFrame:
    """Return rows of hospitals of these sizes, ten patients each, every third row positive."""
    names = [f"hospital {i}" for i, size in enumerate(sizes) for _ in range(size)]
    table = small_table(len(names)).with_columns(pl.Series(GROUP, names))
    number = pl.int_range(pl.len()).over(GROUP) % 10
    return table.with_columns(patient_id=pl.format("{} {}", GROUP, number))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    hospital_table().write_csv(tmp_path / "train-metadata.csv")
    return tmp_path


def folds_per(table: pl.DataFrame, column: str, num_folds: int) -> pl.Series:
    """Return the number of folds of each value of a column."""
    fold = draw_group_folds(table, GROUP, num_folds).of(table)
    return table.with_columns(fold).group_by(column).agg(pl.col("fold").n_unique())["fold"]


@pytest.mark.parametrize("num_folds", [2, 3, 5])
def test_neither_a_hospital_nor_a_patient_is_in_two_folds(num_folds: int) -> None:
    table = hospital_table()
    assert (folds_per(table, GROUP, num_folds) == 1).all()
    assert (folds_per(table, schema.PATIENT, num_folds) == 1).all()


def test_hospitals_that_share_a_patient_are_held_out_together() -> None:
    table = hospital_table()
    shared = pl.col(GROUP).is_in(["hospital 0", "hospital 3"]) & (pl.int_range(pl.len()) % 17 == 0)
    table = table.with_columns(
        patient_id=pl.when(shared).then(pl.lit("both")).otherwise("patient_id")
    )
    fold = draw_group_folds(table, GROUP, 4).of(table)
    together = table.with_columns(fold).group_by(GROUP).agg(pl.col("fold").first()).sort(GROUP)
    first, *_, fourth, _ = together["fold"].to_list()
    assert first == fourth
    assert together["fold"].n_unique() == 4
    with pytest.raises(UserError, match="there are 4; use --num_folds 4"):
        draw_group_folds(table, GROUP, 5)


def test_rows_without_a_hospital_are_one_group() -> None:
    table = hospital_table((60, 60, 60))
    blank = pl.when(pl.col(GROUP) != "hospital 1").then(GROUP)
    table = table.with_columns(blank.alias(GROUP))
    fold = draw_group_folds(table, GROUP, 3).of(table)
    assert table.with_columns(fold).filter(pl.col(GROUP).is_null())["fold"].n_unique() == 1


def test_blanks_and_words_for_missing_make_no_other_hospital() -> None:
    table = hospital_table((60, 60, 60)).with_columns(
        pl.col(GROUP).str.replace("hospital", "clinic").alias("clinic")
    )
    is_odd = pl.int_range(pl.len()) % 2 == 1
    untidy = table.with_columns(
        pl.when(pl.col("clinic") == "clinic 1")
        .then(pl.when(is_odd).then(pl.lit("NA")))
        .otherwise(pl.when(is_odd).then(pl.format("{} ", "clinic")).otherwise("clinic"))
        .alias("clinic")
    ).with_columns(patient_id=schema.ID)
    fold = draw_group_folds(untidy, "clinic", 3).of(untidy)
    per_clinic = table.with_columns(fold).group_by("clinic").agg(pl.col("fold").n_unique())
    assert (per_clinic["fold"] == 1).all()


def test_rows_without_a_patient_do_not_connect_hospitals() -> None:
    table = hospital_table().with_columns(patient_id=pl.lit(None, pl.String))
    assert draw_group_folds(table, GROUP, 5).num_folds == 5


def test_positives_and_rows_are_spread() -> None:
    table = hospital_table((300, 100, 100, 90, 10))
    fold = draw_group_folds(table, GROUP, 2).of(table)
    assert sorted(fold.value_counts()["count"]) == [300, 300]


def test_the_plan_depends_on_the_rows_only() -> None:
    table = hospital_table()
    plan = draw_group_folds(table, GROUP, 3)
    shuffled = table.sample(fraction=1, shuffle=True, seed=3)
    assert draw_group_folds(shuffled, GROUP, 3).digest == plan.digest


@pytest.mark.parametrize(
    ("target", "num_folds", "message"),
    [
        ("hospital 0", 2, "a positive row and patients of their own, there is 1; choose another"),
        ("hospital [0-3]", 5, "there are 4; use --num_folds 4"),
        (".*", 2, "every row of a fold would be positive, with 2 folds"),
    ],
)
def test_folds_of_one_class_are_refused(target: str, num_folds: int, message: str) -> None:
    table = hospital_table().with_columns(target=pl.col(GROUP).str.contains(target).cast(int))
    with pytest.raises(UserError, match=message):
        draw_group_folds(table, GROUP, num_folds)


def test_the_command_writes_the_plan_into_the_dataset(data: Path, cli: Cli) -> None:
    ended = cli("isic", "folds", "--data", data, "--group", GROUP, "--num_folds", 3)
    assert ended.code == 0, ended.err
    assert "fold 2:" in ended.out
    plan = read_folds(data / "folds.parquet")
    assert plan.num_folds == 3
    again = cli("isic", "folds", "--data", data, "--group", GROUP, "--num_folds", 3)
    assert again.code == 0, again.err
    other = cli("isic", "folds", "--data", data, "--group", GROUP, "--num_folds", 2)
    assert other.code == 2
    assert "is another plan; remove it or choose another --output" in other.err
    assert read_folds(data / "folds.parquet").digest == plan.digest


def test_an_unknown_column_is_refused(data: Path, cli: Cli) -> None:
    ended = cli(
        "isic", "folds", "--data", data, "--group", "atribution", "--out", data / "f.parquet"
    )
    assert ended.code == 2
    assert 'no column "atribution", did you mean "attribution"?' in ended.err


def test_patients_of_two_hospitals_are_named(data: Path, cli: Cli) -> None:
    table = hospital_table()
    moved = pl.when(pl.int_range(pl.len()) == 0).then(pl.lit("another")).otherwise(GROUP)
    table.with_columns(moved.alias(GROUP)).write_csv(data / "train-metadata.csv")
    ended = cli("isic", "folds", "--data", data, "--group", GROUP)
    assert ended.code == 0, ended.err
    assert "1 patient with several values of attribution" in ended.out
    assert "hospital 0 0 (another; hospital 0)" in ended.out
