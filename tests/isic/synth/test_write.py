"""Files of the synthetic dataset on disk."""

from pathlib import Path

import h5py

from isic.dataset import Dataset
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
