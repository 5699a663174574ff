from pathlib import Path

import polars as pl

from tests.support.commands import Cli


def test_few_lesions_change_only_relative_features(data: Path, cli: Cli) -> None:
    flags = ["--data", data, "--label", "synthetic", "--sizes", "1,5", "--results", data / "r"]
    ended = cli("benchmarks", "few", *flags, "--num_folds", 3, "--seeds", 2, "--draws", 100)
    assert ended.code == 0, ended.err
    rows = pl.read_csv(data / "r" / "few.csv", infer_schema=False)
    raw, *others = rows.partition_by("features", maintain_order=True)
    assert raw["lesions_together"].to_list() == ["1", "5", "all"]
    assert raw["pauc"].n_unique() == 1
    assert raw["verdict"].null_count() == 3
    names = ["engineered", "engineered, thinned in 0.5"]
    expected = [f"{name}{blend}" for name in names for blend in ("", ", blended with raw")]
    assert [other["features"][0] for other in others] == expected
    for other in others:
        assert other["pauc"].n_unique() == 3
    whole, _, thinned, _ = others
    assert whole["verdict"].null_count() == 0
    assert whole["pauc"].to_list() != thinned["pauc"].to_list()
