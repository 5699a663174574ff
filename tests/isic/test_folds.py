from pathlib import Path

import polars as pl
import pytest

from isic.dataset import Dataset
from isic.folds import draw_folds, folds_for, read_folds
from isic.runtime.errors import UserError
from tests.support.datasets import small_table


def test_no_patient_is_in_two_folds_and_positives_are_spread() -> None:
    table = small_table(600, 60)
    fold = draw_folds(table, 5, 42).of(table)
    by_patient = table.with_columns(fold).group_by("patient_id").agg(pl.col("fold").n_unique())
    assert (by_patient["fold"] == 1).all()
    positives = table.with_columns(fold).group_by("fold").agg(pl.col("target").sum())["target"]
    assert positives.min() >= 30
    assert fold.n_unique() == 5


def test_the_plan_hangs_on_data_and_seed_not_on_row_order() -> None:
    table = small_table()
    plan = draw_folds(table, 5, 42)
    assert draw_folds(table.sample(fraction=1, shuffle=True, seed=3), 5, 42).digest == plan.digest
    assert draw_folds(table, 5, 43).digest != plan.digest
    assert draw_folds(table, 4, 42).digest != plan.digest


def test_rows_without_a_patient_are_their_own_group() -> None:
    table = small_table().drop("patient_id")
    assert draw_folds(table, 5, 42).of(table).n_unique() == 5


def test_written_and_read_back(tmp_path: Path) -> None:
    plan = draw_folds(small_table(), 5, 42)
    plan.write(tmp_path / "folds.parquet")
    assert read_folds(tmp_path / "folds.parquet").digest == plan.digest


def test_a_plan_changed_by_hand_or_broken_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "folds.parquet"
    plan = draw_folds(small_table(), 5, 42)
    swapped = plan.table.with_columns(pl.col("fold").reverse())
    swapped.write_parquet(path, metadata={"digest": plan.digest})
    with pytest.raises(UserError, match="was changed"):
        read_folds(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is not a Parquet file"):
        read_folds(path)
    with pytest.raises(UserError, match="no fold plan"):
        read_folds(tmp_path / "none.parquet")


@pytest.mark.parametrize(
    ("ids", "fold"),
    [
        (["a", "a"], [0, 1]),
        (["a", None], [0, 1]),
        (["a", "b"], [None, None]),
        (["a", "b"], [0, 2]),
        (["a", "b"], [-1, 0]),
        (["a", "b"], ["0", "first"]),
        (["a", "b"], [0.4, 1.4]),
        (["a", "b"], [0.0, float("nan")]),
        ([], []),
    ],
)
def test_a_plan_of_someone_elses_must_make_sense(
    tmp_path: Path, ids: list[str], fold: list[object]
) -> None:
    pl.DataFrame({"isic_id": ids, "fold": fold}).write_parquet(tmp_path / "folds.parquet")
    with pytest.raises(UserError, match="is not a fold plan"):
        read_folds(tmp_path / "folds.parquet")


def test_a_plan_of_a_single_fold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "folds.parquet"
    pl.DataFrame({"isic_id": ["a", "b"], "fold": [0, 0]}).write_parquet(path)
    with pytest.raises(UserError, match=r"has a single fold, .* two or more"):
        read_folds(path)


@pytest.mark.parametrize("fold", [["0", "1"], [0.0, 1.0]])
def test_a_plan_is_read_whatever_its_types(tmp_path: Path, fold: list[object]) -> None:
    pl.DataFrame({"isic_id": ["a", "b"], "fold": fold}).write_parquet(tmp_path / "folds.parquet")
    found = read_folds(tmp_path / "folds.parquet").table
    assert found.dtypes == [pl.String, pl.Int8]
    assert found["fold"].to_list() == [0, 1]


def test_a_run_keeps_its_plan_and_refuses_other_data(tmp_path: Path) -> None:
    table = small_table()
    path = tmp_path / "run" / "folds.parquet"
    pinned = tmp_path / "pinned.parquet"
    first = folds_for(table, 5, 42, path, pinned)
    assert not path.exists(), "a run writes its plan when it begins to train"
    first.write(path)
    assert folds_for(table, 5, 7, path, pinned).digest == first.digest, "decided once"
    with pytest.raises(UserError, match=r"5 folds, not 4; use .* or another output folder"):
        folds_for(table, 4, 42, path, pinned)
    with pytest.raises(UserError, match="lacks 40 rows"):
        folds_for(small_table(100), 5, 42, path, pinned)
    moved = table.with_columns(patient_id=pl.lit("IP_1"))
    with pytest.raises(UserError, match="puts patient IP_1 into two folds"):
        folds_for(moved, 5, 42, path, pinned)


@pytest.mark.parametrize("place", ["run", "data"])
def test_a_seed_that_is_given_must_be_that_of_the_plan(tmp_path: Path, place: str) -> None:
    table = small_table(200)
    run, pinned = tmp_path / "run", tmp_path / "data"
    draw_folds(table, 5, 7).write(tmp_path / place)
    assert folds_for(table, 5, 7, run, pinned, seed_is_given=True).num_folds == 5
    assert folds_for(table, 5, 42, run, pinned).num_folds == 5
    with pytest.raises(UserError, match=r"is not the plan of --split_seed 42; leave --split_seed"):
        folds_for(table, 5, 42, run, pinned, seed_is_given=True)


def test_a_plan_beside_the_data_wins(tmp_path: Path) -> None:
    table = small_table()
    pinned = tmp_path / "pinned.parquet"
    plan = draw_folds(table, 5, 99)
    plan.write(pinned)
    run = tmp_path / "run" / "folds.parquet"
    assert folds_for(table, 5, 42, run, pinned).digest == plan.digest
    with pytest.raises(UserError, match=r"5 folds, not 4; use --num_folds 5, or remove the plan"):
        folds_for(table, 4, 42, run, pinned)


def test_a_plan_beside_the_data_that_is_not_the_runs_is_refused(tmp_path: Path) -> None:
    table = small_table()
    run, pinned = tmp_path / "run" / "folds.parquet", tmp_path / "data" / "folds.parquet"
    draw_folds(table, 5, 42).write(run)
    draw_folds(table, 5, 42).write(pinned)
    assert folds_for(table, 5, 42, run, pinned).num_folds == 5
    draw_folds(table, 5, 99).write(pinned)
    words = f"{pinned} is another fold plan than {run}, .*; use another --name, delete the run's"
    with pytest.raises(UserError, match=words):
        folds_for(table, 5, 42, run, pinned)


def test_one_class_and_too_few_positives_are_refused() -> None:
    table = small_table()
    with pytest.raises(UserError, match="every target is 0"):
        draw_folds(table.with_columns(target=pl.lit(0)), 5, 42)
    few = table.with_columns(target=(pl.col("isic_id") < "ISIC_0000003").cast(pl.Int8))
    with pytest.raises(
        UserError, match="3 patients with a positive row are too few for 5 folds; use --num_folds 3"
    ):
        draw_folds(few, 5, 42)


def test_real_plans(real_data: Path) -> None:
    for folder in ("real-pairs", "real-tabular", "real-crops"):
        table = Dataset(real_data / folder).metadata("train")
        fold = draw_folds(table, 5, 42).of(table)
        positives = table.with_columns(fold).group_by("fold").agg(pl.col("target").sum())["target"]
        assert positives.max() - positives.min() <= 2


def test_a_split_that_leaves_a_fold_with_one_class_is_refused() -> None:
    """Each class has patients enough, but the splitter balances rows and not patients."""
    table = pl.DataFrame(
        {
            "isic_id": [f"ISIC_{row}" for row in range(8)],
            "patient_id": ["a", "b", "b", "c", "c", "d", "e", "e"],
            "target": [0, 0, 1, 1, 0, 1, 1, 1],
        }
    )
    with pytest.raises(UserError, match="seed 42 leaves fold 1 of 3 without a positive row; use"):
        draw_folds(table, 3, 42)
    swapped = table.with_columns(target=1 - pl.col("target"))
    with pytest.raises(UserError, match="leaves fold 1 of 3 without a negative row"):
        draw_folds(swapped, 3, 42)
    assert draw_folds(table, 2, 42).num_folds == 2
