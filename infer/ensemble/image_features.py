"""The features that an ensemble takes from images: the score, and embeddings as columns."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from infer.ensemble import image_scores
from infer.ensemble.image_columns import (
    ALIGNED,
    FROZEN,
    AffineMaps,
    FrozenModel,
    column_names,
    find_frozen_model,
    fit_affine_maps,
    frozen_columns,
    mapped_columns,
    read_affine_maps,
    write_affine_maps,
)
from infer.ensemble.image_scores import LogitScaler
from infer.ensemble.settings import EmbeddingSources
from isic.dataset import Split
from isic.folds import Folds
from isic.runtime.errors import UserError

NEEDS_EMBEDDINGS = (
    "image features need --embeddings outputs/embeddings/<config>; "
    "run `python -m infer embed` first"
)
NEEDS_FROZEN = (
    "frozen columns need --frozen outputs/embeddings/<config>, "
    "of a model that was trained on other images"
)

MAPS_FILE = f"maps_{ALIGNED}.parquet"


@dataclass(frozen=True)
class ImageState:
    """The fitted state of the image features; empty if an ensemble uses none."""

    scaler: LogitScaler | None = None
    """For the image score."""
    maps: AffineMaps | None = None
    """For the aligned embeddings."""
    frozen: FrozenModel | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, in the order of the feature table."""
        names: list[str] = []
        if self.scaler:
            names += image_scores.IMAGE_FEATURES
        if self.maps:
            names += column_names(ALIGNED, len(self.maps[0].offset))
        if self.frozen:
            names += column_names(FROZEN, self.frozen.width)
        return tuple(names)

    @property
    def needs(self) -> dict[str, bool]:
        """Whether each field of `EmbeddingSources` is read."""
        # Frozen embeddings come from a run of their own.
        return {"embeddings": bool(self.scaler or self.maps), "frozen": self.frozen is not None}

    def write(self, root: Path) -> list[str]:
        """Write the maps, which `to_json` leaves out. Return the names of the files."""
        if not self.maps:
            return []
        write_affine_maps(root / MAPS_FILE, self.maps)
        return [MAPS_FILE]

    def to_json(self) -> dict[str, Any]:
        return {
            "image": self.scaler.to_json() if self.scaler else None,
            "maps": [ALIGNED] if self.maps else [],
            "frozen": vars(self.frozen) if self.frozen else None,
        }

    @classmethod
    def read(cls, root: Path, value: Mapping[str, Any]) -> "ImageState":
        """Read the maps from `root` and the rest from `value`, the result of `to_json`."""
        return cls(
            scaler=LogitScaler.from_json(value["image"]) if value["image"] else None,
            maps=read_affine_maps(root / MAPS_FILE) if value["maps"] else None,
            frozen=FrozenModel(**value["frozen"]) if value["frozen"] else None,
        )


def fit_image_state(
    uses_score: bool,
    modes: Collection[str],
    sources: EmbeddingSources,
    metadata: pl.DataFrame,
    folds: Folds,
) -> ImageState:
    """Fit the image features to a training table's embeddings.

    Args:
        uses_score: whether the image model's score is a feature.
        modes: the embedding columns that are features, of `EMBEDDING_MODES`.

    Raises:
        UserError: embeddings that are needed are not given, not finished, of another fold plan,
            or of a model that has learned from the rows it scores.
    """
    scaler = maps = frozen = None
    if FROZEN in modes:
        frozen = find_frozen_model(_required(sources.frozen, NEEDS_FROZEN), metadata)
    if uses_score or ALIGNED in modes:
        root = _required(sources.embeddings, NEEDS_EMBEDDINGS)
        image_scores.read_origin(root, "train", folds.digest)
        # Before anything is fitted: a leak would make every out-of-fold score too good.
        image_scores.refuse_leaks(root, metadata, folds)
        if uses_score:
            logits = image_scores.oof_logits(root, metadata, folds)
            scaler = image_scores.fit_logit_scaler(logits)
        if ALIGNED in modes:
            maps = fit_affine_maps(root, metadata, folds)
    return ImageState(scaler, maps, frozen)


def image_feature_tables(
    state: ImageState,
    sources: EmbeddingSources,
    split: Split,
    metadata: pl.DataFrame,
    folds_digest: str,
    folds: Folds | None,
) -> list[pl.DataFrame]:
    """Read the image features of some rows.

    Args:
        folds_digest: of the fold plan that the embeddings were made with.
        folds: to read each row from the model that held it out; None for the mean over all models.

    Returns:
        Tables of `isic_id` and columns in the order of `metadata`.

    Raises:
        UserError: embeddings are not given, missing, or of another fold plan.
    """
    tables = []
    if state.scaler:
        root = _required(sources.embeddings, NEEDS_EMBEDDINGS)
        if folds:
            logits = image_scores.oof_logits(root, metadata, folds)
        else:
            logits = image_scores.scoring_logits(root, split, metadata, folds_digest, state.scaler)
        tables.append(image_scores.image_features(logits, state.scaler, metadata))
    if state.maps:
        root = _required(sources.embeddings, NEEDS_EMBEDDINGS)
        fold = folds.of(metadata) if folds else None
        tables.append(mapped_columns(root, split, ALIGNED, metadata, state.maps, fold))
    if state.frozen:
        root = _required(sources.frozen, NEEDS_FROZEN)
        tables.append(frozen_columns(root, split, metadata, state.frozen))
    return tables


def _required(root: Path | None, message: str) -> Path:
    if root is None:
        raise UserError(message)
    return root


def embedding_origins(
    state: ImageState, sources: EmbeddingSources, split: Split, folds_digest: str
) -> dict[str, Any]:
    """Return the origin of each of `EmbeddingSources`, None for one that is not used.

    Raises:
        UserError: the embeddings belong to another fold plan.
    """
    origin = None
    if state.needs["embeddings"] and sources.embeddings:
        origin = image_scores.read_origin(sources.embeddings, split, folds_digest)
    return {"embeddings": origin, "frozen": vars(state.frozen) if state.frozen else None}
