import errno
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.support.commands import tiny_settings
from tests.support.datasets import small_table, write_hdf5
from tests.support.training import CPU
from train import decoded as module
from train.decoded import DecodedImages, allocate, free_bytes, keep_repeated, rows_to_keep
from train.loaders import FoldLoaders, fold_loaders
from train.model import preprocess_spec
from train.rows import load_data


@pytest.fixture
def images(small_dataset: Path, tmp_path: Path) -> DecodedImages:
    """60 images of different sizes, every second one with a mask."""
    mask = np.zeros((50, 50), np.uint8)
    mask[:20, :30] = 255
    png = cv2.imencode(".png", mask)[1].tobytes()
    write_hdf5(small_dataset / "masks.hdf5", dict.fromkeys(small_table()["isic_id"][1::2], png))
    settings = tiny_settings(data=small_dataset, output_dir=tmp_path, mask_weight=1.0)
    return DecodedImages(load_data(settings).rows, preprocess_spec(settings))


def refuse_to_decode(data: bytes) -> None:
    raise AssertionError("decoded again")


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_kept_rows_have_the_pixels_of_decoded_ones_and_leave_no_file(
    cache: str, images: DecodedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [images[row] for row in range(60)]
    uses = np.arange(60) % 4  # every fourth row is used three times
    keep_repeated(images, uses, cache, tmp_path / "fold", "fold 0")
    assert list((tmp_path / "fold").glob("*")) == []
    assert (images.slots >= 0).sum() == 15
    for row in range(60):
        found = images[row]
        assert found.keys() == expected[row].keys()
        assert all(np.array_equal(found[key], expected[row][key]) for key in found)
    monkeypatch.setattr(module, "decode", refuse_to_decode)
    with pytest.raises(AssertionError, match="decoded again"):
        images[0]


def test_without_a_cache_nothing_is_kept(images: DecodedImages, tmp_path: Path) -> None:
    keep_repeated(images, np.full(60, 9), "none", tmp_path / "fold", "fold 0")
    assert (images.slots < 0).all()
    assert not (tmp_path / "fold").exists()


def test_the_rows_that_are_used_most_are_kept() -> None:
    uses = np.array([2, 5, 3, 0, 9, 3, 4])
    assert rows_to_keep(uses, 100).tolist() == [1, 2, 4, 5, 6]
    assert rows_to_keep(uses, 3).tolist() == [1, 4, 6]
    assert rows_to_keep(uses, 0).tolist() == []


def test_kept_images_take_half_of_the_free_memory(
    images: DecodedImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 2 * 10 * images.row_bytes)
    keep_repeated(images, np.full(60, 3), "memory", tmp_path, "fold 0")
    assert (images.slots >= 0).sum() == 10
    assert capsys.readouterr().out == (
        "fold 0: 10 of 60 images that are shown 3 times or more are decoded once and kept in memory "
        "(0 MB)\n"
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_bytes("memory", tmp_path) == 5 * images.row_bytes
    monkeypatch.setattr(module, "available_memory", lambda: None)
    assert free_bytes("memory", tmp_path) == 0


def test_a_full_disk_leaves_training_without_kept_images(
    images: DecodedImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    keep_repeated(images, np.full(60, 3), "disk", tmp_path / "fold", "fold 0")
    assert (images.slots < 0).all()
    assert images[3]["image"].shape == (32, 32, 3)
    assert "cannot be kept in a temporary file (No space left on device)" in capsys.readouterr().err
    assert list((tmp_path / "fold").iterdir()) == []


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_forked_process_shares_kept_images(cache: str, tmp_path: Path) -> None:
    shared = allocate(8, cache, tmp_path)
    child = os.fork()
    if not child:
        shared[3] = 42
        os._exit(0)
    os.waitpid(child, 0)
    assert shared[3] == 42


@pytest.mark.parametrize("num_finished", [0, 2])
@pytest.mark.parametrize("flags", [{}, {"select_epoch": "best"}, {"validate_every": 2}])
def test_uses_are_those_of_the_epochs_to_come(
    flags: dict[str, object],
    num_finished: int,
    small_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.sampling.SUBSET_NEGATIVES", 4)
    settings = tiny_settings(
        data=small_dataset,
        output_dir=tmp_path,
        epochs=5,
        batch_size=8,
        positive_repeats=2,
        negatives_per_positive=1,
        **flags,
    )
    data = load_data(settings)
    loaders = fold_loaders(data, 0, preprocess_spec(settings), settings, CPU)
    shown = shown_rows(loaders, settings.epochs, num_finished, settings.validates_all)
    uses = loaders.count_uses(settings, num_finished)
    assert np.array_equal(uses, np.bincount(shown, minlength=60))
    assert uses[data.fold == 0].min() == sum(
        map(settings.validates_all, range(1 + num_finished, 6))
    )


def shown_rows(
    loaders: FoldLoaders, num_epochs: int, num_finished: int, validates_all: object
) -> list[int]:
    """Return the rows of all batches of the epochs."""
    rows: list[int] = []
    for epoch in range(num_finished, num_epochs):
        loaders.sampler.epoch = epoch
        loaders.held_out_sampler.takes_all = validates_all(epoch + 1)  # type: ignore[operator]
        for loader in (loaders.training, loaders.held_out):
            for batch in loader:
                rows += batch.rows.tolist()
    return rows
