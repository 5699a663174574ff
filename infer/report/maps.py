"""A map of each fold's embeddings: one map of all would only show the models' feature spaces."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from infer.embedding.store import scan_embeddings
from infer.report.curves import Projection, pca
from isic import schema
from isic.folds import read_folds
from isic.layout import FOLDS_FILE
from isic.tables import reading

MAX_SHOWN = {0: 400, 1: 150}
"""Largest number of benign (0) and malignant (1) lesions on a map."""


def projections(
    embeddings: Path, oof: pl.DataFrame
) -> Iterator[tuple[int, Projection, pl.DataFrame]]:
    """Yield, by fold, the projection of held-out lesions and their `isic_id` and `target`.

    Args:
        embeddings: the run's folder.
        oof: `isic_id` and `target`; of many lesions a fixed sample is shown.
    """
    for fold, rows in _sampled_features(embeddings, oof):
        features = rows["features"].to_numpy().astype(np.float32)
        # A single NaN would make the whole projection NaN.
        finite = np.isfinite(features).all(axis=1)
        if finite.any():
            shown = rows.filter(pl.Series(finite)).select(schema.ID, schema.TARGET)
            yield fold, pca(features[finite]), shown


def _sampled_features(embeddings: Path, oof: pl.DataFrame) -> Iterator[tuple[int, pl.DataFrame]]:
    # The network's own folds, which need not be the boosters'.
    oof = oof.with_columns(read_folds(embeddings / FOLDS_FILE).find(oof).alias("fold"))
    folds = [rows for _, rows in sorted(oof.group_by("fold"))]
    sampled = pl.concat(sample_lesions(rows) for rows in folds)
    wanted = sampled.select(schema.ID, pl.col("fold").cast(pl.Int8), schema.TARGET)
    stored = scan_embeddings(embeddings, "train", ["features"])
    with reading(embeddings):
        table = stored.join(wanted.lazy(), on=[schema.ID, "fold"]).collect()
    table = table.sort(schema.ID)
    for (fold,), rows in sorted(table.group_by("fold", maintain_order=True)):
        yield int(str(fold)), rows


def sample_lesions(rows: pl.DataFrame) -> pl.DataFrame:
    """Return at most MAX_SHOWN rows of each class, the same ones every time."""
    parts = []
    for label, most in MAX_SHOWN.items():
        part = rows.filter(pl.col(schema.TARGET) == label).sort(schema.ID)
        # A fixed seed, so that a report of the same ensemble has the same bytes.
        parts.append(part.sample(min(len(part), most), seed=0))
    return pl.concat(parts)
