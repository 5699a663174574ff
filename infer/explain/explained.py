"""Occlusion maps of a dataset's images, each by the networks that have not learned from it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.embedding.embed import refuse_unmatched_folds
from infer.embedding.image_embedder import ImageEmbedder
from infer.embedding.models import Models
from infer.explain.occlusion import Fill, occlude
from isic import schema
from isic.folds import read_folds
from isic.images import ImageStore
from isic.layout import FOLDS_FILE, Fold, fold_name
from isic.runtime.errors import UserError, warn

NUM_TOGETHER = 64
"""Images that are decoded together, to bound memory."""


@dataclass(frozen=True, eq=False)
class Explained:
    """The occlusion map of an image."""

    name: str
    fold: Fold | None
    """The fold whose network made it; None for the mean over all folds."""
    logit: float
    """Of the whole image."""
    drops: NDArray[np.float32]
    """[7, 7]."""


def held_out_folds(model_dir: Path, models: Models, names: Sequence[str]) -> dict[str, Fold]:
    """Return, by id, the fold that held a train image out.

    Raises:
        UserError: the fold plan is missing, is not that of the models or lacks an id, or a fold has
            no artifact.
    """
    folds = read_folds(model_dir / FOLDS_FILE)
    refuse_unmatched_folds(models, folds.digest)
    fold = folds.find(pl.DataFrame({schema.ID: names}, {schema.ID: pl.String()}))
    found: dict[str, Fold] = {}
    for name, k in zip(names, fold, strict=True):
        if k is None:
            raise UserError(f"{folds} lacks {name}; give ids of the run's own training table")
        if k not in models.folds:
            raise UserError(
                f"{name} was held out by {fold_name(k)}, which has no such artifact in "
                f"{model_dir}; export it"
            )
        found[name] = k
    return found


def explain_images(
    embedder: ImageEmbedder,
    store: ImageStore,
    fold_of: Mapping[str, Fold | None],
    fill: Fill = "mean",
) -> Iterator[Explained]:
    """Yield the occlusion map of each image, fold by fold; warn of images that cannot be used.

    Args:
        fold_of: the fold by id; None for the mean over all folds.
    """
    for fold in dict.fromkeys(fold_of.values()):
        names = [name for name in fold_of if fold_of[name] == fold]
        for start in range(0, len(names), NUM_TOGETHER):
            yield from _explain(embedder, store, names[start : start + NUM_TOGETHER], fold, fill)


def _explain(
    embedder: ImageEmbedder,
    store: ImageStore,
    names: Sequence[str],
    fold: Fold | None,
    fill: Fill,
) -> Iterator[Explained]:
    pixels, failed = store.load(names, embedder.spec)
    for row, reason in failed.items():
        warn(f"{names[row]} has no map: {reason}")
    good = [row for row in range(len(names)) if row not in failed]
    if not good:
        return
    folds = None if fold is None else [fold]
    found = occlude(embedder.engine, pixels[good], fill, folds, embedder.images_per_batch)
    for row, logit, drops in zip(good, found.logits.tolist(), found.drops, strict=True):
        yield Explained(names[row], fold, logit, drops)
