from pathlib import Path

import polars as pl
import pytest

from benchmarks.record import append
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
    assert len(rows) == 7 and (rows["images_per_second"] > 0).all()
    assert rows["what"][0] == "ours, 1 thread" and rows["first_is_faster_by"][0] == 1.0
    ours, bare = rows["images_per_second"][0], rows["images_per_second"][2]
    assert rows["what"][2] == "bare pread + cv2, 1 thread" and rows["of_bare"][2:].null_count() == 5
    assert rows["of_bare"][0] == pytest.approx(ours / bare, rel=0.01)


def test_results_are_appended_and_new_columns_are_blank_in_old_rows(tmp_path: Path) -> None:
    append("b", [{"what": "x", "seconds": 1.5}], tmp_path)
    append("b", [{"what": "y", "bytes": 7}], tmp_path)
    rows = pl.read_csv(tmp_path / "b.csv")
    assert rows["what"].to_list() == ["x", "y"] and rows["seconds"].to_list() == [1.5, None]
    assert rows["bytes"].to_list() == [None, 7]
    assert rows["commit"].null_count() == rows["processor"].null_count() == 0
