import os
import shutil
from pathlib import Path

import polars as pl
import pytest

from infer.embedding.store import read_run
from tests.support.commands import Cli
from tests.support.datasets import jpeg, write_hdf5
from tests.support.fake_run import FakeRun, make_fake_run


def test_a_resumed_run_keeps_its_batch_size(fake_run: FakeRun, tmp_path: Path, cli: Cli) -> None:
    """The last bits of an engine's outputs may depend on it."""
    assert cli("infer", *fake_run.flags(tmp_path, "--batch_size", 7)).code == 0
    next((tmp_path / "null").rglob("part-*.parquet")).unlink()
    assert cli("infer", *fake_run.flags(tmp_path)).code == 0
    assert read_run(tmp_path / "null", "train")["batch_size"] == 7
    refused = cli("infer", *fake_run.flags(tmp_path, "--batch_size", 9))
    assert refused.code == 2
    assert "made with batch_size = 7, now it is 9" in refused.err


def test_stale_temporary_files_are_deleted(fake_run: FakeRun, tmp_path: Path, cli: Cli) -> None:
    assert cli("infer", *fake_run.flags(tmp_path)).code == 0
    folder = tmp_path / "null" / "train" / "fold_0"
    old = folder / ".part-00000.parquet.old.tmp"
    new = folder / ".part-00000.parquet.new.tmp"
    for path in (old, new):
        path.write_bytes(b"half a shard")
    os.utime(old, (1, 1))
    assert cli("infer", *fake_run.flags(tmp_path)).out.startswith("up to date")
    assert not old.exists()
    assert new.exists(), "it may belong to another run in progress"


def test_images_that_were_replaced_are_noticed(tmp_path: Path, cli: Cli) -> None:
    """Also if a folder has the same file names, or an HDF5 file the same size."""
    fake_run = make_fake_run(tmp_path / "made", num_images=40)
    folder = fake_run.data / "train-image"
    file = fake_run.data / "train-image.hdf5"
    names = pl.read_csv(fake_run.data / "train-metadata.csv")["isic_id"].to_list()
    images = [jpeg(16 + row) for row in range(len(names))]

    def write_folder(order: list[bytes]) -> None:
        folder.mkdir(exist_ok=True)
        for name, image in zip(names, order, strict=True):
            (folder / f"{name}.jpg").write_bytes(image)

    def write_file(order: list[bytes]) -> None:
        write_hdf5(file, dict(zip(names, order, strict=True)))

    for write in (write_file, write_folder):
        for path in (tmp_path / "out", file):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        write(images)
        assert cli("infer", *fake_run.flags(tmp_path / "out")).code == 0
        assert cli("infer", *fake_run.flags(tmp_path / "out")).out.startswith("up to date")
        write(images[1:] + images[:1])
        ended = cli("infer", *fake_run.flags(tmp_path / "out"))
        assert ended.code == 2
        assert "holds embeddings made with other images" in ended.err


def test_force_replaces_a_run_with_a_damaged_spec(
    fake_run: FakeRun, tmp_path: Path, cli: Cli
) -> None:
    assert cli("infer", *fake_run.flags(tmp_path)).code == 0
    assert cli("infer", *fake_run.flags(tmp_path)).out.startswith("up to date")
    (tmp_path / "null" / "train" / "plan.json").write_text("half")
    assert (
        cli("infer", *fake_run.flags(tmp_path, "--force"))
        .out.splitlines()[-1]
        .startswith("embedded ")
    )


@pytest.mark.parametrize("place", ["null/train/plan.json", "null/folds.parquet"])
def test_files_of_something_else_are_not_replaced(
    fake_run: FakeRun, tmp_path: Path, cli: Cli, place: str
) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    (path.parent / "notes.txt").write_text("mine")
    ended = cli("infer", *fake_run.flags(tmp_path, "--force"))
    assert ended.code == 2
    assert "was not written by this command" in ended.err
    assert path.read_text() == "{}"
    assert (path.parent / "notes.txt").read_text() == "mine"
