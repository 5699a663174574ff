from pathlib import Path

import polars as pl

from benchmarks.settings import AccuracySettings
from isic.runtime.config import build
from tests.support.commands import Cli


def test_runs_and_baseline_are_scored_on_the_same_rows(
    trained: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    places = ("--data", synth_dataset, "--model_dir", trained, "--results", tmp_path)
    ended = cli("benchmarks", "accuracy", *places, "--label", "synthetic", "--num_folds", 3)
    assert ended.code == 0, ended.err
    rows = pl.read_csv(tmp_path / "accuracy.csv")
    assert rows["what"].to_list() == ["colour statistics, LightGBM", "tiny, images only"]
    assert rows["rows"].n_unique() == 1
    assert rows["positives"].n_unique() == 1
    assert rows["pauc_pooled"].is_between(0, 0.2).all()
    assert set(rows["published_oof"]) == {0.1582}  # of images, out of fold like these scores
    assert rows["auc_pooled"][0] > 0.6


def test_the_run_has_two_flags(tmp_path: Path) -> None:
    for flag in ("model_dir", "run"):
        settings = build(AccuracySettings, {"data": tmp_path, "label": "x", flag: tmp_path})
        assert settings.model_dir == tmp_path
