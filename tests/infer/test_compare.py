from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import Cli, run_module
from ensembles import write_dataset

from infer.ensemble.compare import _test_seeds


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(
        tmp_path_factory.mktemp("tables") / "data", num_train=1200, num_positives=120
    )


@pytest.fixture(scope="module")
def ensembles(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ensembles of the same rows: one on sensible features, one on a lesion's position alone."""
    folder = tmp_path_factory.mktemp("ensembles")
    for name, features in (("good", "numeric,patient_z"), ("poor", "tbp_lv_x")):
        flags = [
            "--data",
            tables,
            "--output_dir",
            folder,
            "--num_folds",
            3,
            "--num_rounds",
            20,
            "--seeds",
            4,
        ]
        run_module("infer", "fit", "--features", features, "--name", name, *flags)
    return folder


def test_a_real_difference_and_none(ensembles: Path, tables: Path, cli: Cli) -> None:
    ended = cli(
        "infer", "compare", ensembles / "poor", ensembles / "good", "--data", tables, "--draws", 200
    )
    assert ended.code == 0, ended.err
    assert "better in 4 of 4" in ended.out and ended.out.endswith(
        "second against first: a difference\n"
    )
    ended = cli(
        "infer", "compare", ensembles / "good", ensembles / "good", "--data", tables, "--draws", 200
    )
    assert ended.out.endswith("second against first: noise\n") and "p = 1," in ended.out


def test_the_paired_test_sees_what_every_seed_says(capsys: pytest.CaptureFixture[str]) -> None:
    base = np.array([0.150, 0.140, 0.155, 0.145])
    assert _test_seeds(np.stack([base, base + 0.001 + np.array([0, 1, 0, 1]) * 1e-4], axis=1)) == 1
    assert _test_seeds(np.stack([base + 0.001 + np.array([0, 1, 0, 1]) * 1e-4, base], axis=1)) == -1
    assert _test_seeds(np.stack([base, base[::-1]], axis=1)) == 0
    assert _test_seeds(base.reshape(-1, 2)[:1]) is None


def test_ensembles_of_other_rows_are_refused(
    ensembles: Path, tables: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [
        "--data",
        tables,
        "--num_folds",
        4,
        "--num_rounds",
        5,
        "--seeds",
        1,
        "--features",
        "tbp_lv_x",
    ]
    assert cli("infer", "fit", *flags, "--output_dir", tmp_path, "--name", "four").code == 0
    ended = cli("infer", "compare", ensembles / "good", tmp_path / "four", "--data", tables)
    assert ended.code == 2 and "scored on other rows or folds" in ended.err
    other = tmp_path / "other"
    other.mkdir()
    pl.read_csv(tables / "train-metadata.csv", infer_schema=False).head(100).write_csv(
        other / "train-metadata.csv"
    )
    ended = cli("infer", "compare", ensembles / "good", ensembles / "poor", "--data", other)
    assert ended.code == 2 and "lacks 1100 of the scored rows" in ended.err
    ended = cli("infer", "compare", ensembles / "good")
    assert ended.code == 2 and "--second is required" in ended.err
    ended = cli("infer", "compare", "a", "b", "c")
    assert ended.code == 2 and 'unexpected argument "c"' in ended.err
