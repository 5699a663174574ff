"""Small datasets and stand-in embeddings for the tests of fitting and predicting."""

from pathlib import Path

import numpy as np
import polars as pl

from infer.embedding.store import fold_dir, shard_path, write_shard
from infer.ensemble.fit_settings import FitSettings
from isic import schema
from isic.dataset import Dataset
from isic.folds import Folds, draw_folds
from isic.provenance import SEEN_FILE, seen_rows, write_seen
from isic.runtime.files import write_json
from isic.synth.rows import draw_rows

NUM_FOLDS = 3
ENGINES = {"0": "a", "1": "b", "2": "c"}


def write_dataset(
    root: Path, num_train: int = 400, num_positives: int = 60, num_test: int = 30
) -> Path:
    """Writes a dataset of tables only: 40 patients to train on, others to score, one of an unseen institution."""
    rng = np.random.default_rng(3)
    root.mkdir(parents=True)
    train = draw_rows(
        [f"ISIC_1{i:06d}" for i in range(num_train)],
        [f"IP_1{i:06d}" for i in range(40)],
        num_positives,
        rng,
    )
    test = draw_rows(
        [f"ISIC_2{i:06d}" for i in range(num_test)], [f"IP_2{i:06d}" for i in range(6)], 3, rng
    )
    unseen = pl.Series("attribution", ["An institution never seen", *test.table["attribution"][1:]])
    train.table.write_csv(root / "train-metadata.csv")
    test.table.with_columns(unseen).drop(schema.TRAIN_ONLY).write_csv(root / "test-metadata.csv")
    return root


def write_embeddings(
    root: Path, data: Path, folds: Folds | None = None, seed: int = 0, strength: float = 2.0
) -> Path:
    """Writes logits as fold models of different scale would give them; they know the label with some noise."""
    rng = np.random.default_rng(seed)
    train, test = (Dataset(data).metadata(split) for split in ("train", "test"))
    plan = folds or draw_folds(train, NUM_FOLDS, 42)
    fold = plan.of(train).to_numpy()
    plan.write(root / "folds.parquet")
    known = train[schema.TARGET].to_numpy() * strength + rng.standard_normal(len(train))
    hidden = rng.standard_normal(len(test))
    for k in range(plan.num_folds):
        mine = np.flatnonzero(fold == k)
        rows = {"train": (train[schema.ID][mine], known[mine]), "test": (test[schema.ID], hidden)}
        for split, (ids, score) in rows.items():
            logits = (score * (k + 1) - 10 * k).astype(np.float32)
            features = np.zeros((len(logits), 4), dtype=np.float16)
            write_shard(
                shard_path(root, "train" if split == "train" else "test", k, 0),
                ids.to_list(),
                features,
                logits,
            )
    for split in ("train", "test"):
        write_run(root, split, plan)
    write_lists(root, train, plan)
    return root


def write_lists(root: Path, train: pl.DataFrame, plan: Folds) -> None:
    """Writes, for the model of each fold, that it was trained on the rows of the others."""
    fold = plan.of(train)
    for k in range(plan.num_folds):
        write_seen(fold_dir(root, "train", k) / SEEN_FILE, seen_rows(train.filter(fold != k)))


def write_run(root: Path, split: str, plan: Folds) -> None:
    run = {
        "config": root.name,
        "folds": list(range(plan.num_folds)),
        "folds_digest": plan.digest,
        "engines": ENGINES,
    }
    run |= {"checkpoints": ENGINES, "tta": "none", "preprocess": {"size": 8}}
    write_json(root / split / "run.json", run)


def fit_settings(data: Path, output_dir: Path, **more: object) -> FitSettings:
    """Settings of a fit that takes a second."""
    defaults = {"seeds": 1, "num_folds": NUM_FOLDS, "num_rounds": 40, "num_threads": 1}
    return FitSettings.model_validate(defaults | {"data": data, "output_dir": output_dir} | more)
