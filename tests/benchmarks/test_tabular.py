from pathlib import Path

import polars as pl
import pytest

from benchmarks.tabular import METHODS, check_same, write_synthetic_table
from tests.support.commands import Cli


def test_pandas_and_ours_make_the_same_features(tmp_path: Path) -> None:
    check_same(write_synthetic_table(tmp_path, 1500))


@pytest.mark.slow
def test_every_method_has_its_row(tmp_path: Path, cli: Cli) -> None:
    few = ["--rows", 60, "--predict_rows", 500, "--trees", 2, "--fit_rounds", 2, "--repeats", 1]
    ended = cli("benchmarks", "tabular", *few, "--results", tmp_path)
    assert ended.code == 0, ended.err
    rows = pl.read_csv(tmp_path / "tabular.csv")
    boosters = [f"{name}, one booster" for name in ("lightgbm", "xgboost", "catboost")]
    predict = "predict, 2 trees, 968 features"
    assert rows["what"].to_list() == [
        *METHODS,
        *boosters,
        predict,
        f"{predict}, from an Arrow table",
    ]
    assert rows["start_seconds"].drop_nulls().min() > 0
    assert rows["peak_mb"].drop_nulls().min() > 50
    assert rows["rows_per_second"][-1] > 0
