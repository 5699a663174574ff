"""Batches, datasets and learning rates for tests of training."""

from pathlib import Path

import numpy as np
import polars as pl
import torch

from tests.support.datasets import jpeg, write_hdf5
from train.batch import Batch
from train.optim import BACKBONE, HEAD, Schedule

CPU = torch.device("cpu")


def peak_rates(num_steps: int) -> Schedule:
    return dict.fromkeys((BACKBONE, HEAD), np.ones(num_steps))


def random_batch(size: int, side: int = 32, masks: bool = False) -> Batch:
    random = np.random.default_rng(size)
    images = torch.from_numpy(random.integers(0, 256, (size, side, side, 3), dtype=np.uint8))
    drawn = (
        torch.from_numpy(random.integers(0, 2, (size, side, side), dtype=np.uint8))
        if masks
        else torch.empty(0)
    )
    return Batch(images, torch.arange(size) % 2 * 1.0, torch.arange(size), drawn)


def write_extra(folder: Path, targets: list[int]) -> Path:
    """A further dataset whose images are grey; ids name the folder."""
    folder.mkdir()
    ids = [f"{folder.name}_{row}" for row in range(len(targets))]
    pl.DataFrame({"isic_id": ids, "target": targets}).write_csv(folder / "train-metadata.csv")
    write_hdf5(folder / "train-image.hdf5", {name: jpeg(20, 120) for name in ids})
    return folder
