"""What an ensemble takes from images: the score, and embeddings as columns. Learnt when fitting, read when scoring."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from infer.ensemble import image_scores
from infer.ensemble.image_columns import (
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
from infer.ensemble.image_scores import Standard
from isic.dataset import Split
from isic.errors import UserError
from isic.folds import Folds

NEEDS_EMBEDDINGS = "image features need --embeddings outputs/embeddings/<config>; run `python -m infer embed` first"
NEEDS_FROZEN = "frozen columns need --frozen outputs/embeddings/<config>, of a model that was trained on other images"


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
    score: bool,
    forms: Iterable[str],
    sources: Sources,
    metadata: pl.DataFrame,
    folds: Folds,
    components: int,
) -> ImageState:
    """Learns how to read a training table's embeddings.

    Args:
        score: whether the image model's score is a feature.
        forms: which embedding columns are.
        components: columns of the form `components`.

    Raises:
        UserError: embeddings that are needed are not given, not finished, of another fold plan,
            or of a model that has learned from the rows it scores.
    """
    forms = tuple(forms)
    frozen = (
        find_frozen(_given(sources.frozen, NEEDS_FROZEN), metadata) if FROZEN in forms else None
    )
    mapped = [form for form in forms if form in MAPPED]
    if not (score or mapped):
        return ImageState(frozen=frozen)
    root = _given(sources.embeddings, NEEDS_EMBEDDINGS)
    image_scores.made_with(root, "train", folds.digest)
    image_scores.refuse_leaks(root, metadata, folds)
    standard = (
        image_scores.fit_standard(image_scores.oof_logits(root, metadata, folds)) if score else None
    )
    return ImageState(
        standard,
        {form: fit_maps(root, form, metadata, folds, components) for form in mapped},
        frozen,
    )


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
    fold = folds.of(metadata) if folds else None
    for form, maps in state.maps.items():
        root = _given(sources.embeddings, NEEDS_EMBEDDINGS)
        tables.append(mapped_columns(root, split, form, metadata, maps, fold))
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
