from pathlib import Path

import polars as pl

from benchmarks.comparisons import compare_pair
from infer.ensemble.blends.artifact import open_scorer
from infer.ensemble.blends.write import write_blend
from infer.ensemble.settings import BlendSettings
from tests.support.commands import Cli
from tests.support.ensembles import fit_small, write_dataset, write_embeddings


def test_others_are_compared_with_the_first(data: Path, tmp_path: Path, cli: Cli) -> None:
    raw, numeric = (
        fit_small(data, tmp_path / "e", features=features, seeds=2, num_rounds=3)
        for features in ("raw", "numeric")
    )
    searched = {"ensembles": (raw, numeric), "weights": "search", "data": data}
    write_blend(BlendSettings(**searched, output_dir=tmp_path / "e"))
    places = ["--data", data, "--first", raw, "--second", f"{numeric},{tmp_path / 'e' / 'blend'}"]
    flags = ["--label", "synthetic", "--draws", 100, "--results", tmp_path / "r"]
    ended = cli("benchmarks", "comparisons", *places, *flags)
    assert ended.code == 0, ended.err
    rows = pl.read_csv(tmp_path / "r" / "comparisons.csv")
    assert rows["first"].to_list() == ["raw", "raw"]
    assert rows["second"].to_list() == ["numeric", "blend (chosen on these rows)"]
    assert (rows["low"] <= rows["high"]).all()
    assert rows["better_in"][0].endswith("of 2")


def test_networks_that_were_trained_once_do_not_compare_recipes(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", num_train=800, num_positives=120)
    poor, good = (
        fit_small(
            data,
            tmp_path / "e",
            features="image",
            embeddings=write_embeddings(tmp_path / name, data, seed=seed, strength=strength),
        )
        for seed, (name, strength) in enumerate({"poor": 0.5, "good": 4.0}.items())
    )
    row = compare_pair(open_scorer(poor), open_scorer(good), data, 100)
    assert row["verdict"] == "a difference between these trained models"
