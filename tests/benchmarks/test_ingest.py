from pathlib import Path

import polars as pl
import pytest

from tests.support.commands import Cli, split_flags


def test_every_loader_has_a_row(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    places = ("--data", small_dataset, "--results", tmp_path)
    flags = split_flags("--images 40 --repeats 1 --size 32 --index false")
    ended = cli("benchmarks", "ingest", *places, *flags)
    assert ended.code == 0, ended.err
    rows = pl.read_csv(tmp_path / "ingest.csv")
    assert len(rows) == 7
    assert (rows["images_per_second"] > 0).all()
    assert rows["what"][0] == "ours, 1 thread"
    assert rows["first_is_faster_by"][0] == 1.0
    ours = rows["images_per_second"][0]
    bare = rows["images_per_second"][2]
    assert rows["what"][2] == "bare pread + cv2, 1 thread"
    assert rows["of_bare"][2:].null_count() == 5
    assert rows["of_bare"][0] == pytest.approx(ours / bare, rel=0.01)
