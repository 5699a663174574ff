"""Fixtures: embeddings of every image by every fold's model, and by a model of other images."""

import shutil
from pathlib import Path

import polars as pl
import pytest

from isic.folds import Folds, draw_folds
from isic.provenance import seen_rows, write_seen
from tests.support.ensembles import NUM_FOLDS, train_table
from tests.support.fold_embeddings import seen_list, write_fold_embeddings, write_full_run


@pytest.fixture(scope="session")
def folds(data: Path) -> Folds:
    return draw_folds(train_table(data), NUM_FOLDS, 42)


@pytest.fixture(scope="session")
def run(data: Path, folds: Folds) -> Path:
    return write_fold_embeddings(data.parent / "tiny", data, folds, strength=4.0, remembered=0.0)


@pytest.fixture(scope="session")
def frozen(data: Path, run: Path) -> Path:
    """A run of a model that was trained on other images."""
    root = data.parent / "elsewhere"
    shutil.copytree(run, root)
    other = Folds(pl.DataFrame({"isic_id": ["ISIC_9"], "fold": pl.Series([0], dtype=pl.Int8)}))
    other.write(root / "folds.parquet")
    write_seen(seen_list(root), seen_rows(other.table))
    for split in ("train", "test"):
        write_full_run(root, split, other, {"1": "b"})
    return root
