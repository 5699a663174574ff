"""Embeddings as feature columns that are comparable across fold models: `aligned`.

Each fold model's embeddings are rotated onto those of the first fold's model (orthogonal
Procrustes; Schönemann 1966, Psychometrika 31:1). A training row gets the embedding of the model
that held it out, a test row the mean over all fold models.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from infer.embedding.store import (
    Embeddings,
    read_run,
    refuse_missing_embeddings,
    scan_embeddings,
)
from isic import schema
from isic.dataset import Split
from isic.folds import Folds
from isic.layout import Fold, fold_number
from isic.runtime.arithmetic import ceil_div
from isic.runtime.errors import UserError
from isic.tables import read_parquet, reading, write_parquet

ALIGNED = "aligned"

FIRST = 0
"""The fold onto whose embeddings the others are rotated."""
# Many times the number of features of any backbone here.
MAX_ANCHORS = 20_000
"""Images that maps are fitted on."""
MAX_MAPPED_ROWS = 8192
"""Rows that are mapped together, to bound the memory of float64 values."""
READ_ROWS = 32768
"""Embeddings that are read together; 84 MB if they have 1,280 features in float16."""

FeatureMatrix = NDArray[np.floating]


@dataclass(frozen=True)
class AffineMap:
    """Maps the embeddings of one fold's model to the common columns: x @ matrix + offset."""

    matrix: NDArray[np.float64]
    """[D, C]."""
    offset: NDArray[np.float64]
    """[C]."""

    def apply(self, features: FeatureMatrix) -> NDArray[np.float32]:
        """Map [N, D] to [N, C]."""
        # In float64: BLAS sums in an order that depends on the number of rows, and the difference
        # disappears when the result is rounded to float32.
        mapped = features.astype(np.float64) @ self.matrix
        mapped += self.offset
        return mapped.astype(np.float32)


AffineMaps = Mapping[Fold, AffineMap]
"""By fold."""


def maps_file(mode: str, network: str) -> str:
    return f"maps_{mode}_{network}.parquet"


def column_names(mode: str, network: str, width: int) -> tuple[str, ...]:
    return tuple(f"{mode}_{index:03d}.{network}" for index in range(width))


def procrustes(own: FeatureMatrix, target: FeatureMatrix) -> NDArray[np.float64]:
    """Return the orthogonal [C, C] that brings own [N, C] closest to target; both are centred."""
    left, _, right = np.linalg.svd(own.T @ target)
    return np.asarray(left @ right)


def fit_aligned(
    root: Path, network: str, metadata: pl.DataFrame, folds: Folds
) -> tuple[AffineMaps, pl.DataFrame]:
    """Fit the map of each fold's embeddings onto those of the first fold. Uses no labels.

    Args:
        root: an embedding run with every training image embedded by every fold model.
        network: its name, for the columns.

    Returns:
        The maps, and the columns of the training rows: those of the model that held the row out,
        Float32 in the order of `metadata`, null for an unreadable image.

    Raises:
        UserError: the run lacks embeddings, there are fewer than three folds, or the models share
            fewer images than there are features.
    """
    width = _width_if_complete(root, folds)
    rows = _with_anchors(metadata)
    rows = rows.with_columns(held_out_by=folds.of(metadata)[rows["_row"]])
    columns = _MeanColumns(len(rows), column_names(ALIGNED, network, width))
    maps: dict[Fold, AffineMap] = {}
    for k in range(folds.num_folds):
        # Read once for both purposes, since reading takes most of the time.
        wanted = rows.filter(pl.col("is_anchor") | (pl.col("held_out_by") == k))
        found = _find_features(root, "train", k, wanted)
        anchors = found.filter("is_anchor")
        # The bytes of a decomposition depend on the number of BLAS threads.
        with threadpool_limits(1, "blas"):
            if k == FIRST:
                first_anchors = anchors
                maps[k] = _fit_shift(anchors, root)
            else:
                maps[k] = _fit_map(k, anchors, maps[FIRST], first_anchors, root)
        columns.add(found.filter(held_out_by=k), root, maps[k])
    return maps, columns.table()


def _width_if_complete(root: Path, folds: Folds) -> int:
    """Return the number of features. Raise UserError if the run cannot be aligned."""
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
    return int(run["num_features"])


def _with_anchors(metadata: pl.DataFrame) -> pl.DataFrame:
    """Return `_row`, `isic_id` and `is_anchor` of each row, sorted by id."""
    ids = metadata.select(schema.ID).with_row_index("_row")
    is_anchor = pl.int_range(pl.len()) % ceil_div(len(ids), MAX_ANCHORS) == 0
    return ids.sort(schema.ID).with_columns(is_anchor=is_anchor)


def sample_features(root: Path, fold: Fold, metadata: pl.DataFrame) -> FeatureMatrix:
    """Return [N, D] the embeddings of a sample of the training images by one fold's model.

    Raises:
        UserError: embeddings are missing or not finite, or no image could be read.
    """
    anchors = _with_anchors(metadata).filter("is_anchor")
    found = _find_features(root, "train", fold, anchors)
    if found.is_empty():
        raise UserError(f"{root} has no train embedding; embed readable images")
    return _to_matrix(found["features"], root)


def _fit_shift(anchors: pl.DataFrame, root: Path) -> AffineMap:
    """Return the map of the first fold: its space, with the mean of its training images at 0."""
    trained_on = anchors.filter(pl.col("held_out_by") != FIRST)
    center = _to_matrix(trained_on["features"], root).astype(np.float64).mean(axis=0)
    return AffineMap(np.eye(len(center)), -center)


def _fit_map(
    k: int, anchors: pl.DataFrame, first_map: AffineMap, first_anchors: pl.DataFrame, root: Path
) -> AffineMap:
    """Fit the map of fold k, from anchors embedded by its model and by that of the first fold."""
    # Only images that both models were trained on. Of an image that one model held out, the other
    # has learned the label, and a rotation of hundreds of columns could carry the label over.
    own = anchors.select(schema.ID, own="features")
    both = first_anchors.join(own, on=schema.ID, how="inner", maintain_order="left")
    shared = both.filter(~pl.col("held_out_by").is_in([FIRST, k]))
    target = first_map.apply(_to_matrix(shared["features"], root))
    return _fit_rotation(_to_matrix(shared["own"], root).astype(np.float64), target, root)


def _fit_rotation(own: FeatureMatrix, target: FeatureMatrix, root: Path) -> AffineMap:
    """Fit the rotation and shift that bring own [N, D] closest to target [N, D]."""
    num_images, width = own.shape
    # With fewer images than features the rotation is not determined.
    if num_images < width:
        raise UserError(
            f"{root}: {num_images} shared images are too few to align {width} features; "
            f"embed more images, or leave {ALIGNED} out"
        )
    target = target.astype(np.float64)
    center = own.mean(axis=0)
    target_center = target.mean(axis=0)
    rotation = procrustes(own - center, target - target_center)
    return AffineMap(rotation, target_center - center @ rotation)


class _MeanColumns:
    """Embeddings of some rows as columns, the mean over the models that each row has."""

    def __init__(self, num_rows: int, names: Sequence[str]) -> None:
        self.names = list(names)
        # By columns, so that the table takes the array over without a copy: at full size it has
        # hundreds of megabytes.
        self.total = np.zeros((num_rows, len(names)), np.float32, order="F")
        self.num_models = np.zeros(num_rows, np.int64)

    def add(self, found: pl.DataFrame, root: Embeddings, affine_map: AffineMap) -> None:
        """Add a model's embeddings: the `_row` and `features` that were found in `root`."""
        features = _to_matrix(found["features"], root, width=len(affine_map.matrix))
        rows = found["_row"].to_numpy()
        for start in range(0, len(rows), MAX_MAPPED_ROWS):
            part = slice(start, start + MAX_MAPPED_ROWS)
            self.total[rows[part]] += affine_map.apply(features[part])
        self.num_models[rows] += 1

    def table(self) -> pl.DataFrame:
        """Return Float32 columns; a row without a model is null. Nothing can be added then."""
        self.total /= np.maximum(self.num_models, 1).astype(np.float32)[:, None]
        table = pl.DataFrame(self.total, self.names)
        if self.num_models.all():
            return table
        return table.with_columns(pl.when(pl.Series(self.num_models > 0)).then(pl.all()))


def mapped_columns(
    root: Embeddings, split: Split, names: Sequence[str], metadata: pl.DataFrame, maps: AffineMaps
) -> pl.DataFrame:
    """Return the mean over models of mapped embeddings, as Float32 columns named `names`.

    The rows are in the order of `metadata`; one without a readable image is null.

    Raises:
        UserError: embeddings are missing, not finite, or of another width.
    """
    ids = metadata.select(schema.ID).with_row_index("_row")
    columns = _MeanColumns(len(ids), names)
    for k, affine_map in maps.items():
        for found in _read_features(root, split, k, ids):
            columns.add(found, root, affine_map)
    return columns.table()


def write_affine_maps(path: Path, maps: AffineMaps) -> None:
    """Write maps as a table: per fold the rows of its matrix and, last, the offset."""
    tables = []
    for fold, affine_map in maps.items():
        rows = pl.DataFrame({"values": np.vstack([affine_map.matrix, affine_map.offset])})
        tables.append(rows.with_columns(fold=pl.lit(fold, dtype=pl.Int8)))
    write_parquet(path, pl.concat(tables))


def read_affine_maps(path: Path) -> AffineMaps:
    """Read the table that `write_affine_maps` wrote."""
    table = read_parquet(path)
    maps: dict[Fold, AffineMap] = {}
    for fold in table["fold"].unique().sort().to_list():
        rows = table.filter(fold=fold)["values"].to_numpy()
        maps[fold] = AffineMap(rows[:-1], rows[-1])
    return maps


def _find_features(
    root: Embeddings, split: Split, fold: Fold, wanted: pl.DataFrame
) -> pl.DataFrame:
    """Return the rows of `wanted` with their `features` as `_read_features` does, sorted by id."""
    return pl.concat(_read_features(root, split, fold, wanted)).sort(schema.ID)


def _read_features(
    root: Embeddings, split: Split, fold: Fold, wanted: pl.DataFrame
) -> Iterator[pl.DataFrame]:
    """Yield the rows of `wanted` with the `features` by one fold's model, some at a time.

    Unreadable images are left out.

    Raises:
        UserError: an embedding is missing, or there are several per image.
    """
    stored = scan_embeddings(root, split, ["features"], fold)
    with reading(str(root)):
        ids = stored.select(schema.ID).collect()
    places = wanted.select(schema.ID).with_row_index("place")
    place = ids.join(places, on=schema.ID, how="left", maintain_order="left")["place"]
    found = place.drop_nulls()
    if found.is_duplicated().any():
        raise UserError(
            f"{root}: an image has more than one {split} embedding of fold {fold}; embed again"
        )
    number = pl.lit(fold_number(fold), dtype=pl.Int8).alias("fold")
    is_missing = ~places["place"].is_in(found.implode())
    missing = wanted.filter(is_missing).select(schema.ID, number)
    refuse_missing_embeddings(missing, len(wanted), root, split)
    for start in range(0, max(len(ids), 1), READ_ROWS):
        part = place.slice(start, READ_ROWS)
        with reading(str(root)):
            features = stored.select("features").slice(start, READ_ROWS).collect()
        yield wanted[part.drop_nulls()].hstack(features.filter(part.is_not_null()))


def _to_matrix(found: pl.Series, root: Embeddings, width: int | None = None) -> FeatureMatrix:
    """Return [N, D] features. Raise UserError if D is not `width`, or a value not finite."""
    features = found.to_numpy()
    if width is not None and features.shape[1] != width:
        raise UserError(
            f"{root} holds embeddings of {features.shape[1]} features, not {width}; "
            "give embeddings of the same model"
        )
    if not np.isfinite(features).all():
        raise UserError(f"{root}: embeddings are not finite; train and export the model again")
    return features
