from pathlib import Path

import polars as pl

from benchmarks.settings import AccuracySettings
from infer.ensemble.blends.write import write_blend
from infer.ensemble.settings import BlendSettings
from isic.runtime.config import build
from tests.support.commands import Cli
from tests.support.ensembles import fit_small


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


def test_scores_that_their_rows_have_chosen_are_marked(
    data: Path, tmp_path: Path, cli: Cli
) -> None:
    for name, features in (("a", "numeric"), ("b", "raw")):
        fit_small(data, tmp_path / "ensembles", name=name, features=features, num_rounds=3)
    chosen = {"ensembles": (tmp_path / "ensembles" / "a", tmp_path / "ensembles" / "b")}
    for weights in ("equal", "search"):
        folders = {"output_dir": tmp_path / "ensembles", "name": weights, "data": data}
        write_blend(BlendSettings.model_validate({**chosen, **folders, "weights": weights}))
    for name in ("best", "last"):
        write_run(tmp_path / name, tmp_path / "ensembles" / "a", name)
        flags = ["--label", "x", "--data", data, "--results", tmp_path / "r", "--baseline=false"]
        sources = ["--model_dir", tmp_path / name, "--ensembles", tmp_path / "ensembles"]
        ended = cli("benchmarks", "accuracy", *flags, *sources)
        assert ended.code == 0, ended.err
    shown = set(pl.read_csv(tmp_path / "r" / "accuracy.csv")["what"])
    assert shown == {
        "a, ensemble",
        "b, ensemble",
        "equal, ensemble",
        "search, ensemble (chosen on these rows)",
        "last, images only",
        "best, images only (chosen on these rows)",
    }


def write_run(run: Path, ensemble: Path, select_epoch: str) -> None:
    """Write the settings and scores of a training run's folds."""
    oof = pl.read_parquet(ensemble / "oof.parquet").rename({"blend": "logit"})
    for (fold,), rows in oof.group_by("fold"):
        folder = run / f"fold_{fold}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"select_epoch: {select_epoch}\n")
        rows.select("isic_id", "fold", "target", "logit").write_parquet(folder / "oof.parquet")


def test_the_run_has_two_flags(tmp_path: Path) -> None:
    for flag in ("model_dir", "run"):
        settings = build(AccuracySettings, {"data": tmp_path, "label": "x", flag: tmp_path})
        assert settings.model_dir == tmp_path
