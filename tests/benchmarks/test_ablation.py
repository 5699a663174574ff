from pathlib import Path

import polars as pl

from benchmarks.ablation import IMAGE_SETS, TABULAR_SETS
from benchmarks.settings import AblationSettings
from infer.ensemble.features.spec import FeatureSpec
from isic.runtime.config import build
from tests.support.commands import Cli, split_flags


def test_every_set_and_library_has_a_row_and_a_paired_difference(data: Path, cli: Cli) -> None:
    places = ("--data", data, "--results", data / "r")
    flags = split_flags("--label synthetic --seeds 2 --num_rounds 3 --draws 100")
    flags += split_flags("--features raw,raw+formula --libraries lightgbm,lightgbm+xgboost")
    ended = cli("benchmarks", "ablation", *places, *flags)
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


def test_several_fold_plans_pair_their_folds(data: Path, cli: Cli) -> None:
    places = ("--data", data, "--results", data / "r")
    flags = split_flags("--label synthetic --seeds 2 --num_rounds 3 --draws 100 --splits 3")
    ended = cli("benchmarks", "ablation", *places, *flags, "--features", "raw,numeric",
                "--libraries", "lightgbm")  # fmt: skip
    assert ended.code == 0, ended.err
    rows = pl.read_csv(data / "r" / "ablation.csv")
    assert rows["better_in"][1].endswith("of 15")
    assert rows["low"][1] is not None


def test_every_default_set_is_known() -> None:
    for words in (*TABULAR_SETS, *IMAGE_SETS):
        assert FeatureSpec.parse(words.replace("+", ",")).words


def test_an_unknown_library_is_refused(data: Path, cli: Cli) -> None:
    ended = cli("benchmarks", "ablation", "--data", data, "--label", "x", "--libraries", "lightgb")
    assert ended.code == 2
    assert 'unknown library "lightgb", did you mean "lightgbm"' in ended.err
    defaults = build(AblationSettings, {"data": data, "label": "x"})
    assert defaults.libraries[-1] == "lightgbm+xgboost+catboost"
