"""Embeddings of every image by every fold's model, in spaces of their own."""

from pathlib import Path

import numpy as np

from infer.embedding.store import shard_path, write_shard
from isic import schema
from isic.dataset import SPLITS, Dataset
from isic.folds import Folds
from isic.runtime.files import write_json
from tests.support.ensembles import ENGINES, NUM_FOLDS, train_table, write_seen_lists

WIDTH = 12
REMEMBERED = 6.0
"""How much of a training image's label an overfitted model writes into the image's embedding."""


def spaces(width: int) -> list[np.ndarray]:
    """Return an orthogonal matrix per fold model."""
    rng = np.random.default_rng(6)
    return [np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in range(NUM_FOLDS)]


def write_full_run(
    root: Path, split: str, folds: Folds, engines: dict[str, str] = ENGINES, width: int = WIDTH
) -> None:
    """Write the `run.json` of embeddings by every fold."""
    run = {
        "config": root.name,
        "folds": [int(k) for k in engines],
        "folds_digest": folds.digest,
        "folds_mode": "all",
        "engines": engines,
        "checkpoints": engines,
        "tta": "none",
        "preprocess": {"size": 8},
        "num_features": width,
    }
    write_json(root / split / "run.json", run)


def write_fold_embeddings(
    root: Path, data: Path, folds: Folds, strength: float, remembered: float, width: int = WIDTH
) -> Path:
    """Write embeddings of every image by every fold: the same features, in rotated spaces.

    Args:
        strength: how much a malignant lesion differs from a benign one.
        remembered: how much a model knows of the label of an image that it was trained on.
    """
    rng = np.random.default_rng(5)
    folds.write(root / "folds.parquet")
    for split in SPLITS:
        table = Dataset(data).metadata(split)
        target = table[schema.TARGET].to_numpy() if split == "train" else np.zeros(len(table))
        fold = folds.of(table).to_numpy() if split == "train" else np.full(len(table), -1)
        common = rng.standard_normal((len(table), width)) * np.linspace(3, 1, width)
        common[:, 0] += strength * target
        for k, rotation in enumerate(spaces(width)):
            seen = (fold != k) & (fold >= 0)
            own = common + 0.1 * rng.standard_normal(common.shape)
            own[:, 1] += remembered * target * seen
            features = (own @ rotation + k).astype(np.float32)
            logits = own[:, 0].astype(np.float32)
            write_shard(shard_path(root, split, k, 0), table[schema.ID].to_list(), features, logits)
        write_full_run(root, split, folds, width=width)
    write_seen_lists(root, train_table(data), folds)
    return root


def seen_list(root: Path, fold: int = 1) -> Path:
    return root / "train" / f"fold_{fold}" / "trained_on.parquet"
