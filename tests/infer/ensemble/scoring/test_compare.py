import re
import shutil
from pathlib import Path

import polars as pl
import pytest

from isic.folds import read_folds
from tests.support.commands import Cli
from tests.support.ensembles import (
    fit_small,
    train_table,
    write_dataset,
    write_embeddings,
    write_train,
)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(
        tmp_path_factory.mktemp("tables") / "data", num_train=1200, num_positives=120
    )


@pytest.fixture(scope="module")
def ensembles(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ensembles of the same rows: one on all numbers, one only on a lesion's position."""
    folder = tmp_path_factory.mktemp("ensembles")
    for name, features in (("good", "numeric,patient_z"), ("poor", "tbp_lv_x")):
        fit_small(tables, folder, features=features, name=name, num_rounds=20, seeds=4)
    return folder


def test_a_real_difference_and_none(ensembles: Path, tables: Path, cli: Cli) -> None:
    flags = ["--data", tables, "--draws", 200]
    ended = cli("infer", "compare", ensembles / "poor", ensembles / "good", *flags)
    assert ended.code == 0, ended.err
    assert "better in 4 of 4" in ended.out
    assert ended.out.endswith("second against first: a difference\n")
    ended = cli("infer", "compare", ensembles / "good", ensembles / "good", *flags)
    assert ended.out.endswith("second against first: noise\n")
    assert "p = 1," in ended.out


@pytest.fixture(scope="module")
def runs(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image-only ensembles of three training runs of a poor and of a good recipe."""
    folder = tmp_path_factory.mktemp("runs")
    for name, strength in (("poor", 0.5), ("good", 4.0)):
        for run in range(3):
            root = folder / "embeddings" / f"{name}{run}"
            write_embeddings(root, tables, seed=10 * run + int(strength), strength=strength)
            chosen = {"features": "image", "embeddings": root, "name": root.name}
            fit_small(tables, folder, **chosen)
    return folder


def test_one_training_run_per_side_does_not_compare_recipes(
    runs: Path, ensembles: Path, tables: Path, cli: Cli
) -> None:
    flags = ["--data", tables, "--draws", 200]
    ended = cli("infer", "compare", runs / "poor0", runs / "good0", *flags)
    assert "a difference between these trained models; to compare the recipes" in ended.out
    ended = cli("infer", "compare", ensembles / "poor", runs / "good0", *flags)
    assert "a difference between these trained models" in ended.out
    poor = ",".join(str(runs / f"poor{run}") for run in range(3))
    good = ",".join(str(runs / f"good{run}") for run in range(3))
    ended = cli("infer", "compare", poor, good, *flags)
    assert ended.code == 0, ended.err
    assert "runs " in ended.out
    assert "better in 3 of 3" in ended.out
    assert ended.out.endswith("second against first: a difference\n")


def test_several_ensembles_on_one_network_are_one_training_run(
    runs: Path, tables: Path, tmp_path: Path, cli: Cli
) -> None:
    sides = []
    for name in ("poor", "good"):
        network = {"features": "tbp_lv_x,image", "embeddings": runs / "embeddings" / f"{name}0"}
        for seed in (0, 10):
            fit_small(tables, tmp_path, **network, seed=seed, name=f"{name}{seed}", num_rounds=5)
        sides.append(f"{tmp_path / name}0,{tmp_path / name}10")
    ended = cli("infer", "compare", *sides, "--data", tables, "--draws", 100)
    assert ended.code == 0, ended.err
    assert "boosters " in ended.out
    assert "runs " not in ended.out.replace("training runs", "")
    assert "a difference between these trained models; to compare the recipes" in ended.out
    assert "does not cover chance in training" in ended.out


def test_equal_fits_under_other_names_are_refused(
    ensembles: Path, tables: Path, tmp_path: Path, cli: Cli
) -> None:
    sides = []
    for name in ("poor", "good"):
        copies = [shutil.copytree(ensembles / name, tmp_path / f"{name}{run}") for run in (1, 2)]
        sides.append(",".join(map(str, copies)))
    ended = cli("infer", "compare", *sides, "--data", tables, "--draws", 100)
    assert ended.code == 2
    assert "poor2 have equal scores, so they are one training run" in ended.err


def test_sides_of_unequal_length_and_a_run_given_twice_are_refused(
    runs: Path, tables: Path, cli: Cli
) -> None:
    two = f"{runs / 'good0'},{runs / 'good1'}"
    ended = cli("infer", "compare", runs / "poor0", two, "--data", tables)
    assert ended.code == 2
    assert "cannot compare 1 ensembles with 2" in ended.err
    twice = f"{runs / 'good0'},{runs}/./good0"
    ended = cli("infer", "compare", twice, two, "--data", tables)
    assert ended.code == 2
    assert "good0 is given twice on one side" in ended.err


def test_ensembles_of_other_rows_are_refused(
    ensembles: Path, tables: Path, tmp_path: Path, cli: Cli
) -> None:
    four = fit_small(tables, tmp_path, features="tbp_lv_x", name="four", num_folds=4, num_rounds=5)
    ended = cli("infer", "compare", ensembles / "good", four, "--data", tables)
    assert ended.code == 2
    assert "scored on different rows or folds" in ended.err
    other = write_train(tmp_path / "other", train_table(tables).head(100))
    ended = cli("infer", "compare", ensembles / "good", ensembles / "poor", "--data", other)
    assert ended.code == 2
    assert "lacks 1100 of the scored rows" in ended.err
    ended = cli("infer", "compare", ensembles / "good")
    assert ended.code == 2
    assert "--second is required" in ended.err
    ended = cli("infer", "compare", "a", "b", "c")
    assert ended.code == 2
    assert 'unexpected argument "c"' in ended.err


def write_changed(root: Path, tables: Path, **columns: pl.Series) -> Path:
    """Write the training table with other columns; the ending of the root is the file's."""
    root.mkdir()
    changed = train_table(tables).with_columns(**columns)
    if root.suffix == ".parquet":
        changed.write_parquet(root / "train-metadata.parquet")
    else:
        changed.write_csv(root / "train-metadata.csv")
    return root


def test_only_the_data_of_the_fit_is_accepted(
    ensembles: Path, tables: Path, tmp_path: Path, cli: Cli
) -> None:
    train = train_table(tables)
    fold = read_folds(ensembles / "good" / "folds.parquet").of(train)
    by_fold = train.select(pl.col("patient_id").shuffle(seed=1).over(fold)).to_series()
    target = train["target"]
    flipped = pl.Series([1 - target[0], *target[1:]])
    hint = "give the --data that"
    for name, columns, code, message in (
        ("same.parquet", {}, 0, ""),
        ("same.csv", {}, 0, ""),
        ("targets", {"target": flipped}, 2, "has another target for 1 of the scored rows"),
        ("patients", {"patient_id": train["patient_id"].shuffle(seed=1)}, 2, "in two folds"),
        ("within_folds", {"patient_id": by_fold}, 0, "other values than .* in patient_id; "),
        ("numbers", {"tbp_lv_x": train["tbp_lv_x"] + 1}, 0, "other values .* in tbp_lv_x; "),
    ):
        other = write_changed(tmp_path / name, tables, **columns)
        copies = [shutil.copytree(ensembles / each, other / each) for each in ("poor", "good")]
        for command in (
            ("compare", *copies, "--draws", 100),
            ("blend", *copies, "--out", other, "--name", "both"),
            ("report", "--ensemble", copies[0]),
        ):
            ended = cli("infer", *command, "--data", other)
            assert ended.code == code, (command, ended.err)
            assert re.search(message, ended.err), command
            assert (hint in ended.err) == bool(message), command


def test_the_ensemble_of_other_data_is_named(data: Path, tmp_path: Path, cli: Cli) -> None:
    other = write_changed(tmp_path / "other", data, tbp_lv_x=train_table(data)["tbp_lv_x"] + 1)
    one, two = (fit_small(each, tmp_path / each.name, features="raw") for each in (data, other))
    for given, differs in ((data, two), (other, one)):
        ended = cli("infer", "compare", one, two, "--data", given, "--draws", 100)
        assert f"other values than the training table of {differs} in tbp_lv_x" in ended.err
        assert ended.err.count("other values") == 1


def test_compare_blends_seed_by_seed(
    data: Path, three_libraries: Path, tmp_path: Path, cli: Cli
) -> None:
    one = fit_small(data, tmp_path, features="raw", seeds=2, num_rounds=8)
    ended = cli("infer", "compare", one, three_libraries, "--data", data, "--draws", 100)
    assert ended.code == 0, ended.err
    assert "of 2\n" in ended.out
    assert "second against first" in ended.out
