from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks.ablation import IMAGES, TABULAR, AblationSettings
from infer.ensemble.feature_spec import FeatureSpec
from isic.runtime.config import build
from isic.synth.rows import draw_rows
from tests.support.commands import Cli


@pytest.fixture
def data(tmp_path: Path) -> Path:
    ids, patients = [f"ISIC_{i:07d}" for i in range(200)], [f"IP_{i:07d}" for i in range(30)]
    rows = draw_rows(ids, patients, 40, np.random.default_rng(0))
    rows.table.write_csv(tmp_path / "train-metadata.csv")
    return tmp_path


def test_every_set_and_library_has_a_row_and_a_paired_difference(data: Path, cli: Cli) -> None:
    flags = [
        "--data",
        data,
        "--label",
        "synthetic",
        "--features",
        "raw,raw+formula",
        "--seeds",
        2,
        "--num_rounds",
        3,
        "--draws",
        100,
    ]
    ended = cli(
        "benchmarks",
        "ablation",
        *flags,
        "--libraries",
        "lightgbm,lightgbm+xgboost",
        "--results",
        data / "r",
    )
    assert ended.code == 0, ended.err
    rows = pl.read_csv(data / "r" / "ablation.csv")
    assert rows["features"].to_list() == ["raw", "raw+formula"] * 2
    assert rows["model"].unique(maintain_order=True).to_list() == ["lightgbm", "lightgbm+xgboost"]
    assert rows["num_features"].to_list() == [42, 94] * 2
    assert rows["difference"].is_null().to_list() == [True, False] * 2
    assert rows["better_in"][1].endswith("of 2")
    assert rows["verdict"].is_null().to_list() == [True, False] * 2
    changed = rows.filter(pl.col("verdict").is_not_null())
    assert (changed["low"] <= changed["high"]).all()
    certain = (changed["low"] > 0) | (changed["high"] < 0)
    assert (certain | (changed["verdict"] == "noise")).all()


def test_every_default_set_is_known() -> None:
    assert all(FeatureSpec.parse(words.replace("+", ",")).words for words in (*TABULAR, *IMAGES))


def test_an_unknown_library_is_a_sentence(data: Path, cli: Cli) -> None:
    ended = cli("benchmarks", "ablation", "--data", data, "--label", "x", "--libraries", "lightgb")
    assert ended.code == 2 and 'unknown library "lightgb", did you mean "lightgbm"' in ended.err
    assert (
        build(AblationSettings, {"data": data, "label": "x"}).libraries[-1]
        == "lightgbm+xgboost+catboost"
    )
