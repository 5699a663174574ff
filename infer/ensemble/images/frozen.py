"""Embeddings by one model that was trained on other images, as columns.

- `frozen`: the embedding itself.
- `frozen_pca`: its first principal components, each of variance 1 in the training rows.

Both need no labels and are the same function of an image for training rows and new rows.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from infer.embedding.store import ORIGIN_KEYS, Embeddings, read_run, refuse_other_origin
from infer.ensemble.images.columns import (
    AffineMap,
    column_names,
    mapped_columns,
    maps_file,
    read_affine_maps,
    sample_features,
    write_affine_maps,
)
from infer.ensemble.images.scores import LogitScaler
from isic.components import principal_components
from isic.dataset import Split
from isic.layout import TRAINED_ON_FILE, Fold, fold_dir, fold_number
from isic.provenance import read_seen, refuse_seen

FROZEN = "frozen"
PCA = "frozen_pca"

NUM_COMPONENTS = 16
# The covariance has float64 rounding.
TINY = 1e-10
"""Share of the variance under which a direction is rounding."""


@dataclass(frozen=True)
class FrozenModel:
    """The model of a network that was trained on other images."""

    config: str
    fold: Fold
    made_with: Mapping[str, Any]
    """ORIGIN_KEYS of its embedding run, and `pretrained`, the weights that it started from."""
    width: int
    """Number of features."""
    scaler: LogitScaler | None = None
    """For its score."""
    components: AffineMap | None = None
    """For its principal components."""

    @property
    def components_file(self) -> str:
        return maps_file(PCA, self.config)

    def names(self, forms: Collection[str]) -> tuple[str, ...]:
        """Return the columns of its embeddings, in the order of the feature table."""
        names = column_names(FROZEN, self.config, self.width) if FROZEN in forms else ()
        if PCA in forms and self.components:
            names += column_names(PCA, self.config, len(self.components.offset))
        return names

    def write(self, root: Path) -> list[str]:
        """Write the components, which `to_json` leaves out. Return the names of the files."""
        if not self.components:
            return []
        write_affine_maps(root / self.components_file, {fold_number(self.fold): self.components})
        return [self.components_file]

    def to_json(self) -> dict[str, Any]:
        scaler = self.scaler.to_json() if self.scaler else None
        components = self.components_file if self.components else None
        return {**vars(self), "scaler": scaler, "components": components}

    @classmethod
    def read(cls, root: Path, value: Mapping[str, Any]) -> "FrozenModel":
        """Read the components from `root` and the rest from `value`, the result of `to_json`."""
        scaler = LogitScaler.from_json(value["scaler"]) if value["scaler"] else None
        components = None
        if value.get("components"):  # earlier versions had none
            (components,) = read_affine_maps(root / value["components"]).values()
        return cls(**{**value, "scaler": scaler, "components": components})


def find_frozen_model(root: Path, metadata: pl.DataFrame) -> FrozenModel:
    """Return the backbone, or the model of the lowest fold, of an embedding run; no scaler.

    Raises:
        UserError: the model has learned from images or patients of this table.
    """
    run = read_run(root, "train")
    fold = min(run["folds"])
    refuse_seen(
        metadata,
        read_seen(fold_dir(root / "train", fold) / TRAINED_ON_FILE),
        f"the frozen model behind {root}",
        "train it on other images of other patients",
    )
    return FrozenModel(run["config"], fold, _origin_of_fold(run, fold), int(run["num_features"]))


def _origin_of_fold(run: Mapping[str, Any], fold: Fold) -> dict[str, Any]:
    """Return ORIGIN_KEYS of a run and its pretrained weights, with only this fold's digests."""
    origin = {key: run.get(key) for key in (*ORIGIN_KEYS, "pretrained")}
    for key in ("checkpoints", "pretrained"):
        origin[key] = (origin[key] or {}).get(str(fold))
    return origin


def refuse_other_frozen_model(root: Embeddings, split: Split, model: FrozenModel) -> None:
    """Raise a UserError if an embedding run is not by the frozen model."""
    origin = _origin_of_fold(read_run(root, split), model.fold)
    refuse_other_origin(root, split, origin, model.made_with)


def frozen_columns(
    root: Embeddings, split: Split, network: str, metadata: pl.DataFrame, model: FrozenModel
) -> pl.DataFrame:
    """Return the embeddings of a network's frozen model as columns, as `mapped_columns` does."""
    # Frozen embeddings of train and test come from one model, so they need no map.
    identity = AffineMap(np.eye(model.width), np.zeros(model.width))
    names = column_names(FROZEN, network, model.width)
    return mapped_columns(root, split, names, metadata, {model.fold: identity})


def fit_components(root: Path, metadata: pl.DataFrame, model: FrozenModel) -> AffineMap:
    """Fit the map of a frozen model's embeddings onto their principal components, of variance 1.

    All training rows take part, or an even sample of them: labels are not read, so the rows of a
    fold that is held out cannot give theirs away.

    Raises:
        UserError: the run lacks embeddings.
    """
    found = principal_components(sample_features(root, model.fold, metadata), NUM_COMPONENTS)
    # A direction in which the training rows do not vary would be noise.
    scale = np.where(found.variances > TINY * found.total_variance, found.variances, np.inf)
    matrix = found.directions / np.sqrt(scale)
    return AffineMap(matrix, -found.center @ matrix)


def component_columns(
    root: Embeddings, split: Split, network: str, metadata: pl.DataFrame, model: FrozenModel
) -> pl.DataFrame:
    """Return the principal components of a frozen model's embeddings, as `mapped_columns` does."""
    assert model.components is not None
    names = column_names(PCA, network, len(model.components.offset))
    return mapped_columns(root, split, names, metadata, {model.fold: model.components})
