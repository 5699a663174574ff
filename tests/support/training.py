"""Batches, datasets and learning rates for tests of training."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from tests.support.datasets import jpeg, write_hdf5
from train.batch import Batch
from train.optim import BACKBONE, HEAD, Schedule
from train.timm_models import pretrained_config

CPU = torch.device("cpu")


def peak_rates(num_steps: int) -> Schedule:
    """Return a schedule that stays at the peak learning rates."""
    return dict.fromkeys((BACKBONE, HEAD), np.ones(num_steps))


def random_batch(size: int, side: int = 32, masks: bool = False) -> Batch:
    """Return a batch of noise with alternating targets."""
    random = np.random.default_rng(size)
    images = random.integers(0, 256, (size, side, side, 3), dtype=np.uint8)
    rows = torch.arange(size)
    batch = Batch(torch.from_numpy(images), rows % 2 * 1.0, rows, seeds=rows)
    if not masks:
        return batch
    noise = random.integers(0, 2, (size, side, side), dtype=np.uint8)
    return batch._replace(masks=torch.from_numpy(noise))


def write_extra(folder: Path, targets: list[int]) -> Path:
    """Write a dataset of grey images whose ids contain the folder's name."""
    folder.mkdir()
    ids = [f"{folder.name}_{row}" for row in range(len(targets))]
    pl.DataFrame({"isic_id": ids, "target": targets}).write_csv(folder / "train-metadata.csv")
    write_hdf5(folder / "train-image.hdf5", {name: jpeg(20, 120) for name in ids})
    return folder


def other_constants(model: str) -> dict[str, Any]:
    """Return timm's config of a model as a version with another mean and std would have it."""
    return {**pretrained_config(model), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
