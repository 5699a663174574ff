"""Embeddings as columns that mean the same in every row, though each fold's model has a space of its own.

`aligned`: every fold's space is turned onto that of one fold by the orthogonal rotation that brings the embeddings of
the same images nearest (Procrustes; Schönemann 1966, Psychometrika 31:1). `components`: the same between the leading
principal components of each space. A training row has the embedding of the one model that never saw its patient, a
test row the mean over all. `frozen`: the embedding of one model that was trained on other images.

The map of a fold is fitted on images that both models were trained on. On an image that one of them held out, the
other has seen the label, and a rotation of hundreds of columns has room to carry it over.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from infer.embeddings import ORIGIN, fold_dir, load, read_run, refuse_other_origin
from infer.ensemble.image_scores import refuse_gaps
from isic import schema
from isic.dataset import Split
from isic.errors import UserError
from isic.files import write_parquet
from isic.folds import Folds
from isic.provenance import SEEN_FILE, read_seen, refuse_seen
from isic.tables import read_parquet, reading

MAPPED = ("aligned", "components")
FROZEN = "frozen"
FORMS = (*MAPPED, FROZEN)

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


def principal_axes(centred: Floats, number: int) -> NDArray[np.float64]:
    """Returns [D, number] orthonormal directions of largest variance; the largest entry of each is positive."""
    _, axes = np.linalg.eigh(centred.T @ centred)
    leading = axes[:, ::-1][:, :number]
    signs = np.sign(leading[np.abs(leading).argmax(axis=0), np.arange(leading.shape[1])])
    return np.asarray(leading * signs)


def fit_maps(root: Path, form: str, metadata: pl.DataFrame, folds: Folds, components: int) -> Maps:
    """Fits the map of every fold onto the first fold's space. No label is looked at.

    Args:
        root: an embedding run in which every fold's model saw every training image.
        form: one of MAPPED.
        metadata: the training table.
        components: columns of `components`.

    Raises:
        UserError: the run is another one, there are fewer than three folds, or too few images for the columns.
    """
    run = read_run(root, "train")
    if run.get("folds_mode") != "all":
        raise UserError(
            f"{form} needs every training image embedded by every fold's model; "
            "run `python -m infer embed` with --folds all into an empty folder"
        )
    if folds.num_folds < 3:
        raise UserError(
            f"{form} needs at least 3 folds, so that two models share images they were trained on"
        )
    ids = metadata.select(schema.ID).with_columns(folds.of(metadata).alias("fold")).sort(schema.ID)
    anchors = ids.gather_every(-(-len(ids) // MAX_ANCHORS))
    first, *others = range(folds.num_folds)
    with threadpool_limits(
        1, "blas"
    ):  # the bytes of a decomposition depend on the number of threads
        own = _read(root, "train", first, anchors.filter(pl.col("fold") != first))
        center = own.mean(axis=0)
        axes = _axes(own - center, form, components, root)
        maps = {first: Map(axes, -center @ axes)}
        for k in others:
            shared = anchors.filter(~pl.col("fold").is_in([first, k]))
            own, reference = (_read(root, "train", fold, shared) for fold in (k, first))
            maps[k] = _fit_map(own, maps[first].apply(reference), form, components, root)
    return maps


def _fit_map(own: Floats, target: Floats, form: str, components: int, root: Path) -> Map:
    """Fits the map that brings own [N, D] nearest to target [N, C]."""
    center, target = own.mean(axis=0), target.astype(np.float64)
    axes = _axes(own - center, form, components, root)
    matrix = axes @ procrustes((own - center) @ axes, target - target.mean(axis=0))
    return Map(matrix, target.mean(axis=0) - center @ matrix)


def _axes(centred: Floats, form: str, components: int, root: Path) -> NDArray[np.float64]:
    num_images, width = centred.shape
    columns = width if form == "aligned" else components
    if columns > width or columns > num_images:
        hint = "use components, or more images" if form == "aligned" else "use fewer --components"
        raise UserError(
            f"{root}: {num_images} images of {width} features do not determine {columns} columns; {hint}"
        )
    return np.eye(width) if form == "aligned" else principal_axes(centred, components)


def mapped_columns(
    root: Path, split: Split, form: str, metadata: pl.DataFrame, maps: Maps, fold: pl.Series | None
) -> pl.DataFrame:
    """Returns `isic_id` and the form's columns Float32 in the order of `metadata`, null where no image could be read.

    Args:
        fold: [N] the fold whose model a row's embedding is to come from; None for the mean over all.

    Raises:
        UserError: embeddings are missing, not finite, or of another width.
    """
    ids = metadata.select(schema.ID).with_row_index("_row")
    total = np.zeros((len(ids), len(next(iter(maps.values())).offset)), np.float32)
    number = np.zeros(len(ids), np.int64)
    for k, map_ in maps.items():
        wanted = ids if fold is None else ids.filter(fold == k)
        found = _found(root, split, k, wanted)
        rows, features = found["_row"].to_numpy(), _matrix(found, root, len(map_.matrix))
        total[rows] += map_.apply(features)
        number[rows] += 1
    mean = total / np.maximum(number, 1).astype(np.float32)[:, None]
    table = pl.DataFrame(mean, list(column_names(form, mean.shape[1])))
    if not number.all():
        table = table.with_columns(pl.when(pl.Series(number > 0)).then(pl.all()))
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
