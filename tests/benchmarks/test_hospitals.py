from pathlib import Path

import polars as pl
import pytest

from tests.support.commands import Cli


@pytest.mark.slow
def test_hospitals_are_held_out_whole(data: Path, cli: Cli) -> None:
    flags = ["--data", data, "--label", "synthetic", "--features", "raw", "--results", data / "r"]
    flags += ["--seeds", 2, "--draws", 100, "--split_seeds", "7", "--blank_shares", "0.2"]
    flags += ["--hospital_shares", "0.5"]
    ended = cli("benchmarks", "hospitals", *flags)
    assert ended.code == 0, ended.err
    rows = pl.read_csv(data / "r" / "hospitals.csv", infer_schema=False)
    treatments = ["as they are", "without the hospital", "blanked in 0.2"]
    treatments += ["hospital blanked in 0.5"]
    assert rows["treatment"].unique(maintain_order=True).to_list() == treatments
    counts = (
        pl.read_csv(data / "train-metadata.csv").group_by("attribution").agg(pl.col("target").sum())
    )
    enough = sorted(counts.filter(pl.col("target") >= 10)["attribution"])
    expected = [*enough, "mean of hospitals", "split seed 7"]
    assert rows.filter(treatment="as they are")["scored"].to_list() == expected
    assert rows.filter(treatment="as they are")["verdict"].null_count() == len(expected)
    assert rows.filter(treatment="without the hospital")["verdict"].null_count() == 0


def test_data_of_one_hospital_are_refused(data: Path, cli: Cli) -> None:
    path = data / "train-metadata.csv"
    pl.read_csv(path).with_columns(attribution=pl.lit("one")).write_csv(path)
    ended = cli("benchmarks", "hospitals", "--data", data, "--label", "x", "--results", data / "r")
    assert ended.code == 2
    assert "has 1 hospitals" in ended.err
    assert not (data / "r").exists()
