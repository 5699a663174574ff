"""Files of the synthetic dataset on disk."""

import resource
from pathlib import Path

import h5py
import pytest

from isic.dataset import Dataset
from isic.images import Hdf5Images
from isic.runtime.errors import UserError
from isic.synth.write import write_images
from tests.support.commands import Cli
from tests.support.datasets import small_disk


def test_images_are_stored_as_the_challenge_stores_them(synth_dataset: Path) -> None:
    with h5py.File(synth_dataset / "train-image.hdf5") as file:
        assert len(file) == 300
        for dataset in file.values():
            assert dataset.shape == ()
            assert dataset.dtype.kind == "S"
            assert dataset.chunks is None
            assert dataset.id.get_offset() is not None
    store = Dataset(synth_dataset).images("train")
    assert store.missing(Dataset(synth_dataset).metadata("train")["isic_id"].to_list()) == []


def test_a_full_disk_is_reported(tmp_path: Path, cli: Cli) -> None:
    with small_disk(tmp_path / "disk", "600k"):
        ended = cli("isic", "synth", "--output_dir", tmp_path / "disk" / "data", "--images", 200)
        assert ended.code == 2, ended.err
        assert ended.err.startswith("error: the disk is full"), ended.err


def test_a_limit_on_the_size_of_files_is_reported(tmp_path: Path) -> None:
    """HDF5 would end the process if one of its writes failed."""
    images = [(f"ISIC_{number:07d}", bytes([255]) * 20_000) for number in range(10)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*File too large"):
            write_images(tmp_path / "train-image.hdf5", images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    write_images(tmp_path / "train-image.hdf5", images)
    assert len(Hdf5Images(tmp_path / "train-image.hdf5")) == 10
