from pathlib import Path

import polars as pl
import pytest

from tests.support.commands import Cli


def test_every_way_reads_the_images_and_lands_in_the_csv(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [
        "--images",
        40,
        "--repeats",
        1,
        "--size",
        32,
        "--index",
        "false",
        "--results",
        tmp_path,
    ]
    ended = cli("benchmarks", "ingest", "--data", small_dataset, *flags)
    assert ended.code == 0, ended.err
    rows = pl.read_csv(tmp_path / "ingest.csv")
    assert len(rows) == 7
    assert (rows["images_per_second"] > 0).all()
    assert rows["what"][0] == "ours, 1 thread"
    assert rows["first_is_faster_by"][0] == 1.0
    ours, bare = rows["images_per_second"][0], rows["images_per_second"][2]
    assert rows["what"][2] == "bare pread + cv2, 1 thread"
    assert rows["of_bare"][2:].null_count() == 5
    assert rows["of_bare"][0] == pytest.approx(ours / bare, rel=0.01)
