"""What an ensemble takes from images: the score, and embeddings as columns. Learnt when fitting, read when scoring."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from infer import image_scores
from infer.image_columns import (
    FROZEN,
    MAPPED,
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
from infer.image_scores import Standard
from isic.dataset import Split
from isic.errors import UserError
from isic.folds import Folds


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
    maps: Mapping[str, Maps] = field(default_factory=dict)
    """By form, each in a file of its own."""
    frozen: Frozen | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, in the order of the feature table."""
        widths = {form: len(maps[0].offset) for form, maps in self.maps.items()}
        if self.frozen:
            widths[FROZEN] = self.frozen.width
        columns = (name for form, width in widths.items() for name in column_names(form, width))
        return (*(image_scores.FEATURES if self.standard else ()), *columns)

    @property
    def needs(self) -> dict[str, bool]:
        """Which of the sources it reads."""
        return {"embeddings": bool(self.standard or self.maps), "frozen": self.frozen is not None}

    def write(self, root: Path) -> list[str]:
        """Writes the maps and returns the names of their files; the rest is in `to_json`."""
        for form, maps in self.maps.items():
            write_maps(root / _file(form), maps)
        return [_file(form) for form in self.maps]

    def to_json(self) -> dict[str, Any]:
        return {
            "image": self.standard.to_json() if self.standard else None,
            "maps": list(self.maps),
            "frozen": vars(self.frozen) if self.frozen else None,
        }

    @classmethod
    def read(cls, root: Path, value: Mapping[str, Any]) -> "ImageState":
        standard = Standard.from_json(value["image"]) if value["image"] else None
        maps = {form: read_maps(root / _file(form)) for form in value["maps"]}
        return cls(standard, maps, Frozen(**value["frozen"]) if value["frozen"] else None)


def _file(form: str) -> str:
    return f"maps_{form}.parquet"


def learn(
    score: bool, forms: Iterable[str], sources: Sources, metadata: pl.DataFrame, folds: Folds, components: int
) -> ImageState:
    """Learns how to read a training table's embeddings.

    Args:
        score: whether the image model's score is a feature.
        forms: which embedding columns are.
        components: columns of the form `components`.

    Raises:
        UserError: embeddings that are needed are not given, not finished, or of another fold plan.
    """
    forms = tuple(forms)
    mapped = [form for form in forms if form in MAPPED]
    if (score or mapped) and sources.embeddings is None:
        raise UserError(
            "image features need --embeddings outputs/embeddings/<config>; run `python -m infer embed` first"
        )
    if FROZEN in forms and sources.frozen is None:
        raise UserError(
            "frozen columns need --frozen outputs/embeddings/<config>, of a model that was trained on other images"
        )
    state = ImageState(frozen=find_frozen(sources.frozen, metadata) if FROZEN in forms and sources.frozen else None)
    if sources.embeddings is None or not (score or mapped):
        return state
    image_scores.made_with(sources.embeddings, "train", folds.digest)
    standard = (
        image_scores.fit_standard(image_scores.oof_logits(sources.embeddings, metadata, folds)) if score else None
    )
    maps = {form: fit_maps(sources.embeddings, form, metadata, folds, components) for form in mapped}
    return ImageState(standard, maps, state.frozen)


def train_frames(state: ImageState, sources: Sources, metadata: pl.DataFrame, folds: Folds) -> list[pl.DataFrame]:
    """Returns tables of `isic_id` and columns in the order of `metadata`, each row from the model that held it out."""
    frames = []
    if state.standard and sources.embeddings:
        logits = image_scores.oof_logits(sources.embeddings, metadata, folds)
        frames.append(image_scores.image_features(logits, state.standard, metadata))
    for form, maps in state.maps.items():
        assert sources.embeddings
        frames.append(mapped_columns(sources.embeddings, "train", form, metadata, maps, folds.of(metadata)))
    return frames + _frozen(state, sources, "train", metadata)


def scoring_frames(
    state: ImageState, sources: Sources, split: Split, metadata: pl.DataFrame, folds_digest: str
) -> list[pl.DataFrame]:
    """Returns the same for rows to score: the mean over every fold's model."""
    frames = []
    if state.standard and sources.embeddings:
        logits = image_scores.scoring_logits(sources.embeddings, split, metadata, folds_digest, state.standard)
        frames.append(image_scores.image_features(logits, state.standard, metadata))
    for form, maps in state.maps.items():
        assert sources.embeddings
        frames.append(mapped_columns(sources.embeddings, split, form, metadata, maps, None))
    return frames + _frozen(state, sources, split, metadata)


def _frozen(state: ImageState, sources: Sources, split: Split, metadata: pl.DataFrame) -> list[pl.DataFrame]:
    if not state.frozen:
        return []
    assert sources.frozen
    return [frozen_columns(sources.frozen, split, metadata, state.frozen)]


def origins(state: ImageState, sources: Sources, split: Split, folds_digest: str) -> dict[str, Any]:
    """Returns what `embeddings` and `frozen` were made with, None for what is not used.

    Raises:
        UserError: the embeddings are of another fold plan.
    """
    made_with = None
    if state.needs["embeddings"] and sources.embeddings:
        made_with = image_scores.made_with(sources.embeddings, split, folds_digest)
    return {"embeddings": made_with, "frozen": vars(state.frozen) if state.frozen else None}
