import os
import shutil
from pathlib import Path

import polars as pl
import pytest

from infer.embedding.store import read_run
from tests.support.commands import Cli
from tests.support.datasets import jpeg, write_hdf5
from tests.support.fake_run import (
    FakeRun,
    make_fake_run,
)


def test_the_batch_size_of_a_run_is_kept_when_it_goes_on(
    fake_run: FakeRun, tmp_path: Path, cli: Cli
) -> None:
    """What an engine computes may depend on it in the last bit."""
    assert cli("infer", *fake_run.flags(tmp_path, "--batch_size", 7)).code == 0
    next((tmp_path / "null").rglob("part-*.parquet")).unlink()
    assert cli("infer", *fake_run.flags(tmp_path)).code == 0
    assert read_run(tmp_path / "null", "train")["batch_size"] == 7
    refused = cli("infer", *fake_run.flags(tmp_path, "--batch_size", 9))
    assert refused.code == 2 and "made with batch_size = 7, now it is 9" in refused.err


def test_what_a_killed_run_left_behind_is_swept_up(
    fake_run: FakeRun, tmp_path: Path, cli: Cli
) -> None:
    assert cli("infer", *fake_run.flags(tmp_path)).code == 0
    old, new = (
        tmp_path / "null" / "train" / "fold_0" / f".part-00000.parquet.{name}.tmp"
        for name in ("old", "new")
    )
    for path in (old, new):
        path.write_bytes(b"half a part")
    os.utime(old, (1, 1))
    assert cli("infer", *fake_run.flags(tmp_path)).out.startswith("up to date")
    assert new.exists() and not old.exists(), (
        "the new one may belong to a run that goes on beside this one"
    )


def test_images_that_were_replaced_are_noticed(tmp_path: Path, cli: Cli) -> None:
    """In a folder of as many files of the same names, and in a file of the same size."""
    fake_run = make_fake_run(tmp_path / "made", num_images=40)
    folder, file = fake_run.data / "train-image", fake_run.data / "train-image.hdf5"
    names = pl.read_csv(fake_run.data / "train-metadata.csv")["isic_id"].to_list()
    images = [jpeg(16 + row) for row in range(len(names))]

    def write_folder(order: list[bytes]) -> None:
        folder.mkdir(exist_ok=True)
        for name, image in zip(names, order, strict=True):
            (folder / f"{name}.jpg").write_bytes(image)

    for write in (
        lambda order: write_hdf5(file, dict(zip(names, order, strict=True))),
        write_folder,
    ):
        for path in (tmp_path / "out", file):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        write(images)
        assert cli("infer", *fake_run.flags(tmp_path / "out")).code == 0
        assert cli("infer", *fake_run.flags(tmp_path / "out")).out.startswith("up to date")
        write(images[1:] + images[:1])
        ended = cli("infer", *fake_run.flags(tmp_path / "out"))
        assert ended.code == 2 and "holds embeddings made with other images" in ended.err


def test_force_begins_anew(fake_run: FakeRun, tmp_path: Path, cli: Cli) -> None:
    assert cli("infer", *fake_run.flags(tmp_path)).code == 0
    assert cli("infer", *fake_run.flags(tmp_path)).out.startswith("up to date")
    (tmp_path / "null" / "train" / "plan.json").write_text("half")
    assert cli("infer", *fake_run.flags(tmp_path, "--force")).out.startswith("embedded ")


@pytest.mark.parametrize("place", ["null/train/plan.json", "null/folds.parquet"])
def test_what_is_no_embedding_run_stays_as_it_is(
    fake_run: FakeRun, tmp_path: Path, cli: Cli, place: str
) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    (path.parent / "notes.txt").write_text("mine")
    ended = cli("infer", *fake_run.flags(tmp_path, "--force"))
    assert ended.code == 2 and "was not written by this command" in ended.err
    assert path.read_text() == "{}" and (path.parent / "notes.txt").read_text() == "mine"
