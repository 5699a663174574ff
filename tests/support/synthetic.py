"""Samples, crops and files of a synthetic dataset."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import h5py
import lightgbm as lgb
import numpy as np
import polars as pl
from numpy.typing import NDArray

from isic.folds import draw_folds
from isic.preprocess import decode
from isic.synth.dataset import FILES, MANIFEST
from isic.synth.rows import SyntheticRows, draw_rows, num_patients


def draw_synthetic(
    num_rows: int, num_positives: int, seed: int = 0, unseen_site: bool = False
) -> SyntheticRows:
    patients = [f"IP_{i}" for i in range(num_patients(num_rows))]
    ids = [f"ISIC_{i}" for i in range(num_rows)]
    return draw_rows(ids, patients, num_positives, np.random.default_rng(seed), unseen_site)


def synthetic_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*FILES, MANIFEST)}


def crops_of(folder: Path, split: str) -> Iterator[tuple[str, bytes, bytes]]:
    with (
        h5py.File(folder / f"{split}-image.hdf5") as images,
        h5py.File(folder / "masks.hdf5") as masks,
    ):
        for name in images:
            yield name, images[name][()], masks[name][()]


def measured(jpeg: bytes, mask: bytes) -> list[float]:
    """Return mean Lab inside and outside the lesion, and its area in mm²."""
    lesion = cv2.imdecode(np.frombuffer(mask, np.uint8), cv2.IMREAD_UNCHANGED) > 0
    lab = cv2.cvtColor(decode(jpeg).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    return [*lab[lesion].mean(axis=0), *lab[~lesion].mean(axis=0), lesion.mean() * 225]


def out_of_fold(table: pl.DataFrame, features: NDArray[np.generic]) -> NDArray[np.float64]:
    """Score each row with a booster that has not seen its patient."""
    fold = draw_folds(table, 5, 42).of(table).to_numpy()
    target = table["target"].to_numpy()
    score = np.zeros(len(table))
    settings = {
        "objective": "binary",
        "num_threads": 1,
        "verbosity": -1,
        "seed": 0,
        "learning_rate": 0.05,
        "max_depth": 4,
        "num_leaves": 15,
        "feature_fraction": 0.5,
        "min_data_in_leaf": 20,
    }
    for k in np.unique(fold):
        data = lgb.Dataset(features[fold != k], target[fold != k])
        score[fold == k] = lgb.train(settings, data, 120).predict(features[fold == k])
    return score
