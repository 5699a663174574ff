from pathlib import Path

import polars as pl

from benchmarks.augment import cpu_rate
from tests.support.commands import Cli, split_flags
from train.augmentation.levels import DEVICE_LEVELS, LEVELS


def test_every_level_and_source_has_a_row(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    places = ("--data", small_dataset, "--results", tmp_path)
    flags = split_flags("--images 20 --batch 8 --repeats 1 --size 32 --seconds 0.01")
    ended = cli("benchmarks", "augment", *places, *flags)
    assert ended.code == 0, ended.err
    rows = pl.read_csv(tmp_path / "augment.csv")
    assert len(rows) == 2 * len(LEVELS) + len(DEVICE_LEVELS)
    assert (rows["images_per_second"] > 0).all()
    loaded = rows.filter(pl.col("source") == "files")
    assert loaded["what"].to_list() == list(LEVELS)


def test_a_rate_counts_whole_batches_and_gives_each_image_another_seed() -> None:
    seen: list[tuple[int, int]] = []
    assert cpu_rate(seen.extend, num_rows=3, batch=2, seconds=0.001, first_seed=6) > 0
    assert len(seen) % 2 == 0
    assert seen[:4] == [(0, 6), (1, 7), (2, 8), (0, 9)]
