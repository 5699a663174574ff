"""What an ensemble takes from images: the score, and embeddings as columns. Learnt when fitting, read when scoring."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from infer.ensemble import image_scores
from infer.ensemble.image_columns import (
    ALIGNED,
    FROZEN,
    Frozen,
    Maps,
    column_names,
    find_frozen,
    fit_maps,
    frozen_columns,
    mapped_columns,
    read_maps,
    write_maps,
)
from infer.ensemble.image_scores import Standard
from isic.dataset import Split
from isic.folds import Folds
from isic.runtime.errors import UserError

NEEDS_EMBEDDINGS = "image features need --embeddings outputs/embeddings/<config>; run `python -m infer embed` first"
NEEDS_FROZEN = "frozen columns need --frozen outputs/embeddings/<config>, of a model that was trained on other images"

MAPS = f"maps_{ALIGNED}.parquet"


@dataclass(frozen=True)
class Sources:
    """Where embeddings are read from."""

    embeddings: Path | None
    """The run of the fold models."""
    frozen: Path | None
    """The run of a backbone that was trained on other images."""


@dataclass(frozen=True)
class ImageState:
    """What was learnt about images. Empty where an ensemble uses none."""

    standard: Standard | None = None
    maps: Maps | None = None
    """For the aligned embeddings."""
    frozen: Frozen | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, in the order of the feature table."""
        names: list[str] = []
        if self.standard:
            names += image_scores.FEATURES
        if self.maps:
            names += column_names(ALIGNED, len(self.maps[0].offset))
        if self.frozen:
            names += column_names(FROZEN, self.frozen.width)
        return tuple(names)

    @property
    def needs(self) -> dict[str, bool]:
        """Whether each of `Sources` is read."""
        return {"embeddings": bool(self.standard or self.maps), "frozen": self.frozen is not None}

    def write(self, root: Path) -> list[str]:
        """Writes the maps and returns the names of their files; the rest is in `to_json`."""
        if not self.maps:
            return []
        write_maps(root / MAPS, self.maps)
        return [MAPS]

    def to_json(self) -> dict[str, Any]:
        return {
            "image": self.standard.to_json() if self.standard else None,
            "maps": [ALIGNED] if self.maps else [],
            "frozen": vars(self.frozen) if self.frozen else None,
        }

    @classmethod
    def read(cls, root: Path, value: Mapping[str, Any]) -> "ImageState":
        """Reads the maps from `root` and the rest from `value`, as `to_json` returns it."""
        return cls(
            Standard.from_json(value["image"]) if value["image"] else None,
            read_maps(root / MAPS) if value["maps"] else None,
            Frozen(**value["frozen"]) if value["frozen"] else None,
        )


def learn(
    score: bool, forms: Collection[str], sources: Sources, metadata: pl.DataFrame, folds: Folds
) -> ImageState:
    """Learns how to read a training table's embeddings.

    Args:
        score: whether the image model's score is a feature.
        forms: the embedding columns that are features.

    Raises:
        UserError: embeddings that are needed are not given, not finished, of another fold plan,
            or of a model that has learned from the rows it scores.
    """
    standard = maps = frozen = None
    if FROZEN in forms:
        frozen = find_frozen(_given(sources.frozen, NEEDS_FROZEN), metadata)
    if score or ALIGNED in forms:
        root = _given(sources.embeddings, NEEDS_EMBEDDINGS)
        image_scores.made_with(root, "train", folds.digest)
        image_scores.refuse_leaks(root, metadata, folds)
        if score:
            standard = image_scores.fit_standard(image_scores.oof_logits(root, metadata, folds))
        if ALIGNED in forms:
            maps = fit_maps(root, metadata, folds)
    return ImageState(standard, maps, frozen)


def frames(
    state: ImageState,
    sources: Sources,
    split: Split,
    metadata: pl.DataFrame,
    folds_digest: str,
    folds: Folds | None,
) -> list[pl.DataFrame]:
    """Reads the image features of some rows.

    Args:
        folds_digest: of the fold plan that the embeddings were made with.
        folds: where given, a row's come from the model that held it out; else they are the mean over every fold's.

    Returns:
        Tables of `isic_id` and columns in the order of `metadata`.

    Raises:
        UserError: embeddings are not given, missing, or of another fold plan.
    """
    tables = []
    if state.standard:
        root = _given(sources.embeddings, NEEDS_EMBEDDINGS)
        logits = (
            image_scores.oof_logits(root, metadata, folds)
            if folds
            else image_scores.scoring_logits(root, split, metadata, folds_digest, state.standard)
        )
        tables.append(image_scores.image_features(logits, state.standard, metadata))
    if state.maps:
        root = _given(sources.embeddings, NEEDS_EMBEDDINGS)
        fold = folds.of(metadata) if folds else None
        tables.append(mapped_columns(root, split, ALIGNED, metadata, state.maps, fold))
    if state.frozen:
        root = _given(sources.frozen, NEEDS_FROZEN)
        tables.append(frozen_columns(root, split, metadata, state.frozen))
    return tables


def _given(root: Path | None, otherwise: str) -> Path:
    if root is None:
        raise UserError(otherwise)
    return root


def origins(state: ImageState, sources: Sources, split: Split, folds_digest: str) -> dict[str, Any]:
    """Returns what `embeddings` and `frozen` were made with, None for what is not used.

    Raises:
        UserError: the embeddings are of another fold plan.
    """
    made_with = None
    if state.needs["embeddings"] and sources.embeddings:
        made_with = image_scores.made_with(sources.embeddings, split, folds_digest)
    return {"embeddings": made_with, "frozen": vars(state.frozen) if state.frozen else None}
