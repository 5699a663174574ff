"""A map of each fold's embeddings. Fold models have spaces of their own, so one map of all would show the folds."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from infer.embedding.store import scan_embeddings
from infer.report.curves import Projection, pca
from isic import schema
from isic.tables import reading

MOST = {0: 400, 1: 150}
"""Benign and malignant lesions on a map, at most."""


def projections(
    embeddings: Path, oof: pl.DataFrame
) -> Iterator[tuple[int, Projection, pl.DataFrame]]:
    """Yields, by fold, the projection of held-out lesions and their `isic_id` and `target`.

    Args:
        embeddings: the run's folder, made with the ensemble's fold plan.
        oof: `isic_id`, `fold` and `target`; of many lesions a fixed draw is shown.
    """
    drawn = pl.concat(draw(rows) for _, rows in sorted(oof.group_by("fold")))
    wanted = drawn.select(schema.ID, pl.col("fold").cast(pl.Int8), schema.TARGET).lazy()
    stored = scan_embeddings(embeddings, "train", ["features"]).join(wanted, on=[schema.ID, "fold"])
    with reading(embeddings):
        table = stored.collect()
    for (fold,), rows in sorted(table.sort(schema.ID).group_by("fold", maintain_order=True)):
        features = rows["features"].to_numpy().astype(np.float32)
        finite = np.isfinite(features).all(axis=1)
        if finite.any():
            yield (
                int(str(fold)),
                pca(features[finite]),
                rows.filter(pl.Series(finite)).select(schema.ID, schema.TARGET),
            )


def draw(rows: pl.DataFrame) -> pl.DataFrame:
    """Returns at most MOST rows of each class, the same ones every time."""
    classes = [rows.filter(pl.col(schema.TARGET) == label).sort(schema.ID) for label in MOST]
    return pl.concat(
        part.sample(min(len(part), most), seed=0)
        for part, most in zip(classes, MOST.values(), strict=True)
    )
