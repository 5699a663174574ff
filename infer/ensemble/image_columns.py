"""Embeddings as feature columns that are comparable across fold models.

- `aligned`: each fold model's embeddings, rotated onto those of the first fold's model (orthogonal
  Procrustes; Schönemann 1966, Psychometrika 31:1). A training row gets the embedding of the model
  that held it out, a test row the mean over all fold models.
- `frozen`: the embedding of one model that was trained on other images.

A rotation is fitted on images that both models were trained on. Of an image that one model held out,
the other has learned the label, and a rotation of hundreds of columns could pass the label on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from infer.embedding.store import ORIGIN, fold_dir, load, read_run, refuse_other_origin
from infer.ensemble.image_scores import refuse_gaps
from isic import schema
from isic.dataset import Split
from isic.folds import Folds
from isic.provenance import SEEN_FILE, read_seen, refuse_seen
from isic.runtime.arithmetic import ceil_div
from isic.runtime.errors import UserError
from isic.runtime.files import write_parquet
from isic.tables import read_parquet, reading

ALIGNED = "aligned"
FROZEN = "frozen"
FORMS = (ALIGNED, FROZEN)

MAX_ANCHORS = 20_000
"""Images that maps are fitted on: many times the columns of any backbone here."""
BLOCK = 32_768
"""Rows that are mapped together, which bounds the memory for their float64 values."""

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Map:
    """Takes the embeddings of one fold's model to the common columns: features @ matrix + offset."""

    matrix: NDArray[np.float64]
    """[D, C]."""
    offset: NDArray[np.float64]
    """[C]."""

    def apply(self, features: Floats) -> NDArray[np.float32]:
        """Takes [N, D] to [N, C]. In float64, so that how BLAS cuts the rows does not show in float32."""
        blocks = [features[start : start + BLOCK] for start in range(0, len(features), BLOCK)]
        mapped = [
            (block.astype(np.float64) @ self.matrix + self.offset).astype(np.float32)
            for block in blocks
        ]
        return np.concatenate(mapped) if mapped else np.empty((0, len(self.offset)), np.float32)


Maps = Mapping[int, Map]
"""By fold."""


def column_names(form: str, width: int) -> tuple[str, ...]:
    return tuple(f"{form}_{index:03d}" for index in range(width))


def procrustes(own: Floats, target: Floats) -> NDArray[np.float64]:
    """Returns the orthogonal [C, C] that brings own [N, C] nearest to target [N, C], both centred."""
    left, _, right = np.linalg.svd(own.T @ target)
    return np.asarray(left @ right)


def fit_maps(root: Path, metadata: pl.DataFrame, folds: Folds) -> Maps:
    """Fits the map of each fold's embeddings onto those of the first fold. Uses no labels.

    Args:
        root: an embedding run with every training image embedded by every fold model.
        metadata: the training table.

    Raises:
        UserError: the run lacks embeddings, there are fewer than three folds, or fewer shared images
            than features.
    """
    run = read_run(root, "train")
    if run.get("folds_mode") != "all":
        raise UserError(
            f"{ALIGNED} needs every training image embedded by every fold model; "
            "run `python -m infer embed` with --folds all into an empty folder"
        )
    if folds.num_folds < 3:
        raise UserError(
            f"{ALIGNED} needs at least 3 folds, so that two fold models share training images"
        )
    ids = metadata.select(schema.ID).with_columns(folds.of(metadata).alias("fold")).sort(schema.ID)
    anchors = ids.gather_every(ceil_div(len(ids), MAX_ANCHORS))
    first, *others = range(folds.num_folds)
    # The bytes of a decomposition depend on the number of BLAS threads.
    with threadpool_limits(1, "blas"):
        own = _read(root, "train", first, anchors.filter(pl.col("fold") != first))
        maps = {first: Map(np.eye(own.shape[1]), -own.mean(axis=0))}
        for k in others:
            shared = anchors.filter(~pl.col("fold").is_in([first, k]))
            own = _read(root, "train", k, shared)
            reference = _read(root, "train", first, shared)
            maps[k] = _fit_map(own, maps[first].apply(reference), root)
    return maps


def _fit_map(own: Floats, target: Floats, root: Path) -> Map:
    """Fits the rotation and shift that bring own [N, D] nearest to target [N, D]."""
    num_images, width = own.shape
    if num_images < width:
        raise UserError(
            f"{root}: {num_images} shared images are too few to align {width} features; "
            f"embed more images, or leave {ALIGNED} out"
        )
    target = target.astype(np.float64)
    center = own.mean(axis=0)
    target_center = target.mean(axis=0)
    rotation = procrustes(own - center, target - target_center)
    return Map(rotation, target_center - center @ rotation)


def mapped_columns(
    root: Path, split: Split, form: str, metadata: pl.DataFrame, maps: Maps, fold: pl.Series | None
) -> pl.DataFrame:
    """Returns `isic_id` and a form's Float32 columns, in the order of `metadata`.

    A row without a readable image is null.

    Args:
        form: the prefix of the columns.
        fold: [N] fold whose model embeds each row; None for the mean over all models.

    Raises:
        UserError: embeddings are missing, not finite, or of another width.
    """
    ids = metadata.select(schema.ID).with_row_index("_row")
    num_columns = len(maps[min(maps)].offset)
    total = np.zeros((len(ids), num_columns), np.float32)
    num_models = np.zeros(len(ids), np.int64)
    for k, map_ in maps.items():
        wanted = ids if fold is None else ids.filter(fold == k)
        found = _found(root, split, k, wanted)
        rows = found["_row"].to_numpy()
        total[rows] += map_.apply(_matrix(found, root, len(map_.matrix)))
        num_models[rows] += 1
    mean = total / np.maximum(num_models, 1).astype(np.float32)[:, None]
    table = pl.DataFrame(mean, list(column_names(form, num_columns)))
    if not num_models.all():
        table = table.with_columns(pl.when(pl.Series(num_models > 0)).then(pl.all()))
    return metadata.select(schema.ID).hstack(table)


@dataclass(frozen=True)
class Frozen:
    """The one model whose embeddings stand in the columns as they are."""

    config: str
    fold: int
    made_with: Mapping[str, Any]
    """ORIGIN of it."""
    width: int


def find_frozen(root: Path, metadata: pl.DataFrame) -> Frozen:
    """Finds the model whose embeddings are used as they are: the lowest fold of a run.

    Args:
        root: an embedding run.
        metadata: the training table.

    Raises:
        UserError: the model has learned from images or patients of this table.
    """
    run = read_run(root, "train")
    fold = min(run["folds"])
    refuse_seen(
        metadata,
        read_seen(fold_dir(root, "train", fold) / SEEN_FILE),
        f"the frozen model behind {root}",
        "train it on other images of other patients",
    )
    return Frozen(run["config"], fold, _origin(run, fold), int(run["num_features"]))


def _origin(run: Mapping[str, Any], fold: int) -> dict[str, Any]:
    return {key: run.get(key) for key in ORIGIN} | {
        "checkpoints": (run.get("checkpoints") or {}).get(str(fold))
    }


def frozen_columns(
    root: Path, split: Split, metadata: pl.DataFrame, frozen: Frozen
) -> pl.DataFrame:
    """Returns `isic_id` and the embedding's columns Float32, as `mapped_columns` does.

    Raises:
        UserError: as there, or the run is of another model.
    """
    refuse_other_origin(root, split, _origin(read_run(root, split), frozen.fold), frozen.made_with)
    identity = Map(np.eye(frozen.width), np.zeros(frozen.width))
    return mapped_columns(root, split, FROZEN, metadata, {frozen.fold: identity}, None)


def write_maps(path: Path, maps: Maps) -> None:
    """Writes maps as a table: for each fold the rows of its matrix and, last, the offset."""
    parts = [
        pl.DataFrame({"values": np.vstack([map_.matrix, map_.offset])}).with_columns(
            fold=pl.lit(k, dtype=pl.Int8)
        )
        for k, map_ in maps.items()
    ]
    write_parquet(path, pl.concat(parts))


def read_maps(path: Path) -> Maps:
    """Reads what `write_maps` wrote."""
    table = read_parquet(path)
    values = {
        k: table.filter(fold=k)["values"].to_numpy()
        for k in table["fold"].unique().sort().to_list()
    }
    return {k: Map(rows[:-1], rows[-1]) for k, rows in values.items()}


def _found(root: Path, split: Split, fold: int, wanted: pl.DataFrame) -> pl.DataFrame:
    """Reads `features` of the wanted `isic_id` by one fold's model; images that could not be read are absent."""
    rows = load(root, split, ["features"]).filter(pl.col("fold") == fold)
    with reading(root):
        found = wanted.lazy().join(rows, on=schema.ID, how="inner", maintain_order="left").collect()
    if found[schema.ID].is_duplicated().any():
        raise UserError(
            f"{root}: an image has more than one {split} embedding of fold {fold}; embed again"
        )
    gaps = wanted.join(found, on=schema.ID, how="anti").select(
        schema.ID, pl.lit(fold, dtype=pl.Int8).alias("fold")
    )
    refuse_gaps(gaps, len(wanted), root, split)
    return found


def _read(root: Path, split: Split, fold: int, wanted: pl.DataFrame) -> NDArray[np.float64]:
    return _matrix(_found(root, split, fold, wanted.select(schema.ID)), root, None).astype(
        np.float64
    )


def _matrix(found: pl.DataFrame, root: Path, width: int | None) -> Floats:
    features = found["features"].to_numpy()
    if width is not None and features.shape[1] != width:
        raise UserError(
            f"{root} holds embeddings of {features.shape[1]} features, not {width}; give the same model's"
        )
    if not np.isfinite(features).all():
        raise UserError(f"{root}: embeddings are not finite; train and export the model again")
    return features
