from pathlib import Path

import polars as pl
import pytest

from tests.support.commands import Cli


@pytest.mark.slow
def test_the_pipeline_is_measured_against_its_parts_and_as_a_whole(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ["--data", small_dataset, "--results", tmp_path]
    for more in (["--images", 40, "--repeats", 1], ["--whole", "--repeats", 1]):
        ended = cli("benchmarks", "embed", *flags, *more)
        assert ended.code == 0, ended.err
    rows = pl.read_csv(tmp_path / "embed.csv")
    assert rows["end_to_end"][0] > 0
    assert rows["share"][0] > 0
    assert rows["images"].to_list() == [40, 60]
    assert rows["peak_mb"][1] > 50
    assert rows["seconds"][1] > 0
    assert rows["start_seconds"][1] > 0


@pytest.mark.slow
def test_an_untrained_network_is_measured_on_repeated_images(
    tiny: Path, small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ["--data", small_dataset, "--results", tmp_path, "--config", tiny, "--formats", "onnx"]
    more = ["--images", 150, "--batch", 32, "--repeats", 1, "--artifacts", tmp_path / "artifacts"]
    ended = cli("benchmarks", "embed", *flags, *more)
    assert ended.code == 0, ended.err
    (row,) = pl.read_csv(tmp_path / "embed.csv").to_dicts()
    assert (row["what"], row["images"]) == ("tiny, onnx fp32", 150)
    assert row["share"] > 0
    assert any((tmp_path / "artifacts").rglob("*.onnx"))


@pytest.mark.parametrize("flags", [("--whole",), ("--config", "null")])
def test_formats_are_for_an_untrained_network(
    flags: tuple[str, ...], small_dataset: Path, cli: Cli
) -> None:
    config = () if "--config" in flags else ("--config", "demo")
    ended = cli(
        "benchmarks", "embed", "--data", small_dataset, "--formats", "onnx", *config, *flags
    )
    assert ended.code == 2
    assert "--formats is for the untrained network" in ended.err
