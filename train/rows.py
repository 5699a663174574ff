"""The rows of a training run: tables, encoded images and masks, and their folds."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from isic import schema
from isic.dataset import Dataset
from isic.folds import Folds, folds_for
from isic.images import NO_IMAGE, failures, open_hdf5
from isic.layout import ALL, ERRORS_FILE, FOLDS_FILE, Fold
from isic.preprocess import check_mask, decode
from isic.runtime.errors import UserError, warn, warn_once
from isic.runtime.files import digest, sha256
from isic.runtime.machine import num_cores
from isic.tables import write_parquet
from train import distributed
from train.config import TrainSettings
from train.packed import PackedFiles, empty_files, read_packed
from train.targets import flag_columns, with_targets

SAMPLE_ROWS = 50_000
"""Rows that `use_sample` keeps."""
EXTRA = -1
"""Fold of the rows of extra datasets, which are never held out."""
SKIPPED_SCHEMA = {schema.ID: pl.String(), "reason": pl.String(), "dataset": pl.String()}


@dataclass(frozen=True)
class Rows:
    """N rows whose images all decode."""

    table: pl.DataFrame
    """`isic_id`, `target`, if the dataset has it `patient_id`, and any auxiliary targets."""
    images: PackedFiles
    masks: PackedFiles | None
    """PNG files, empty for a row without a mask; None if the run does not use masks."""
    skipped: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=SKIPPED_SCHEMA))
    """The images that cannot be used: id, reason and folder of the dataset (SKIPPED_SCHEMA)."""

    def __add__(self, other: "Rows") -> "Rows":
        table = pl.concat([self.table, other.table], how="diagonal")
        masks = None
        if self.masks is not None and other.masks is not None:
            masks = self.masks + other.masks
        skipped = pl.concat([self.skipped, other.skipped])
        return Rows(table, self.images + other.images, masks, skipped)


@dataclass(frozen=True)
class TrainData:
    """The rows that a run trains and validates on."""

    rows: Rows
    fold: NDArray[np.int8]
    """[N], EXTRA for rows of extra datasets."""
    source: NDArray[np.int16]
    """[N], index into `metadata_paths`; 0 is the dataset that is validated on."""
    folds: Folds
    metadata_paths: list[Path]
    """As from `metadata_paths`."""
    metadata_digests: list[str]
    """Their SHA-256, of when they were read: they may change while a network is trained."""

    @property
    def table(self) -> pl.DataFrame:
        return self.rows.table

    @cached_property
    def images_digest(self) -> str:
        """A digest of all images and masks."""
        files = (self.rows.images, self.rows.masks)
        return digest(*(packed.digest() for packed in files if packed is not None))

    @property
    def target(self) -> NDArray[np.float32]:
        return self.table[schema.TARGET].to_numpy().astype(np.float32)

    def is_held_out(self, fold: Fold) -> NDArray[np.bool_]:
        """Return [N] whether a fold holds each row out."""
        return np.zeros(len(self.fold), bool) if fold == ALL else self.fold == fold

    def held_out(self, fold: Fold) -> pl.DataFrame:
        """Return the rows of `table` that a fold holds out."""
        return self.table.filter(pl.Series(self.is_held_out(fold)))


def metadata_paths(settings: TrainSettings) -> list[Path]:
    """Return the training tables: of the dataset, then of each extra dataset."""
    roots = (settings.data, *settings.extra_data)
    return [Dataset(root).metadata_path("train") for root in roots]


def load_data(settings: TrainSettings) -> TrainData:
    """Load the training rows of the dataset and of the extra datasets.

    Raises:
        UserError: anything is wrong with a dataset; with `on_error=skip`, rows without a usable
            image are skipped and listed in `errors.parquet` instead.
    """
    dataset = Dataset(settings.data)
    table = dataset.metadata("train")
    run_plan = settings.run_dir / FOLDS_FILE
    folds = folds_for(
        table,
        settings.num_folds,
        settings.split_seed,
        run_plan,
        dataset.folds_path,
        seed_is_given="split_seed" in settings.model_fields_set,
    )
    path = dataset.metadata_path("train")
    flags = flag_columns(table, settings.aux, path)
    table = with_targets(table, settings.aux, flags, path)
    sample = sample_rows(table, SAMPLE_ROWS, settings.split_seed) if settings.use_sample else table
    rows = load_rows(dataset, sample, settings)
    # With the ids of the whole table: masks of rows outside the sample are no mistake.
    warn_of_unmatched_masks(dataset.masks_path, table[schema.ID], rows.masks)
    fold = folds.of(rows.table).to_numpy()

    sizes = [len(rows.table)]
    for root in settings.extra_data:
        extra = load_extra(root, [table, rows.table], settings, flags)
        rows += extra
        sizes.append(len(extra.table))
    if rows.masks is not None and rows.masks.is_empty.all():
        raise UserError(
            f"{dataset.masks_path} has no mask of any training image; add masks, or set "
            "--mask_weight 0"
        )
    # At once, because extra datasets have skipped images too.
    if len(rows.skipped) and distributed.is_main():
        write_parquet(settings.run_dir / ERRORS_FILE, rows.skipped)
    no_fold = np.full(sum(sizes[1:]), EXTRA, np.int8)
    source = np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)
    paths = metadata_paths(settings)
    digests = [sha256(path) for path in paths]
    return TrainData(rows, np.concatenate([fold, no_fold]), source, folds, paths, digests)


def sample_rows(table: pl.DataFrame, num_rows: int, seed: int) -> pl.DataFrame:
    """Return about `num_rows` rows that include every positive, in the table's order."""
    negatives = table.filter(pl.col(schema.TARGET) == 0)
    num_negatives = num_rows - (len(table) - len(negatives))
    if num_negatives >= len(negatives):
        return table
    kept = negatives.sample(max(num_negatives, 1), seed=seed)[schema.ID]
    return table.filter((pl.col(schema.TARGET) == 1) | pl.col(schema.ID).is_in(kept.implode()))


def load_extra(
    root: Path, others: list[pl.DataFrame], settings: TrainSettings, flags: frozenset[str]
) -> Rows:
    """Load the rows of an extra dataset that share no image or patient with the other tables.

    Args:
        flags: as for `train.targets.with_targets`.
    """
    dataset = Dataset(root)
    table = with_targets(
        dataset.metadata("train"), settings.aux, flags, dataset.metadata_path("train")
    )
    table = exclude_overlap(table, others, root)
    rows = load_rows(dataset, table, settings)
    check_classes(rows.table, root, settings.extra_ratio)
    return rows


def exclude_overlap(table: pl.DataFrame, others: list[pl.DataFrame], root: Path) -> pl.DataFrame:
    """Return the rows of an extra dataset whose image and patient are in none of the others."""
    # A patient in the training rows and in the held-out rows would inflate the out-of-fold score.
    kept = table
    for other in others:
        for key in (schema.ID, schema.PATIENT):
            if key in kept.columns and key in other.columns:
                overlaps = pl.col(key).is_in(other[key].drop_nulls().implode())
                kept = kept.filter(~overlaps.fill_null(False))
    num_skipped = len(table) - len(kept)
    if num_skipped and distributed.is_main():
        print(f"{root}: {num_skipped} rows skipped, their image or patient is in another dataset")
    return kept


def check_classes(table: pl.DataFrame, root: Path, negatives_per_positive: float | None) -> None:
    """Warn if an extra dataset has only one class.

    Raises:
        UserError: it has no positive for `negatives_per_positive` to count from.
    """
    classes = table[schema.TARGET].unique().to_list()
    if classes == [0] and negatives_per_positive is not None:
        raise UserError(
            f"{root}: none of the {len(table)} rows is positive, so {negatives_per_positive:g} "
            "negatives per positive would use none of them; remove it from --extra_data"
        )
    if len(classes) == 1 and distributed.is_main():
        warn(
            f"{root}: the target of all {len(table)} rows is {classes[0]}; the network can learn "
            "to recognise this dataset instead of lesions",
        )


def load_rows(dataset: Dataset, table: pl.DataFrame, settings: TrainSettings) -> Rows:
    """Read and check the images, and masks if the run uses them, of a table's rows.

    Raises:
        UserError: an image cannot be used and `on_error` is `raise`, or a mask cannot be used.
    """
    keys = (schema.ID, schema.TARGET, schema.PATIENT, *(target.key for target in settings.aux))
    table = table.select([key for key in keys if key in table.columns])
    ids = table[schema.ID].to_list()
    images, unread = read_packed(dataset.images("train"), ids)
    # A run of hours should not end at a broken file; the check takes 0.1 ms per file and core.
    errors = undecodable(images) | unread
    skipped = skipped_table(errors, ids, dataset.root)
    if errors:
        report_errors(skipped, len(ids), settings.on_error, settings.run_dir / ERRORS_FILE)
        is_good = np.ones(len(ids), bool)
        is_good[list(errors)] = False
        table, images = table.filter(is_good), images.without(errors)
    if not settings.mask_weight:
        return Rows(table, images, None, skipped)
    masks = load_masks(dataset.masks_path, table[schema.ID].to_list(), images)
    return Rows(table, images, masks, skipped)


def undecodable(images: PackedFiles) -> dict[int, str]:
    """Return the reason by row for every file that does not decode."""
    return failures(lambda row: decode(images[row]), range(len(images)), num_cores())


def skipped_table(errors: dict[int, str], ids: list[str], root: Path) -> pl.DataFrame:
    """Return the images that cannot be used, as SKIPPED_SCHEMA; `errors` has reasons by row."""
    rows = [(ids[row], errors[row], str(root)) for row in sorted(errors)]
    return pl.DataFrame(rows, SKIPPED_SCHEMA, orient="row")


def report_errors(skipped: pl.DataFrame, num_rows: int, on_error: str, path: Path) -> None:
    """Print the number of images that cannot be used.

    Args:
        skipped: the images of one dataset, as SKIPPED_SCHEMA.
        num_rows: of the dataset's table.
        on_error: `raise` or `skip`.
        path: the file that will list them.

    Raises:
        UserError: `on_error` is `raise`.
    """
    first, reason, root = skipped.row(0)
    summary = (
        f"{root}: {len(skipped)} of {num_rows} images cannot be used, the first is {first} "
        f"({reason})"
    )
    if on_error == "raise":
        raise UserError(f"{summary}; fix them, or skip their rows with --on_error skip")
    if distributed.is_main():
        print(f"{summary}; their rows are skipped and listed in {path}")


def load_masks(path: Path, ids: list[str], images: PackedFiles) -> PackedFiles:
    """Read the mask files of `ids`, empty for an image without one.

    Raises:
        UserError: the file of masks, or one of the masks, cannot be used.
    """
    store = open_hdf5(path)
    if store is None:
        return empty_files(len(ids))
    masks, unread = read_packed(store, ids)
    other_sizes: dict[int, str] = {}

    def check(row: int) -> None:
        sizes = check_mask(masks[row], images[row])
        if sizes:
            other_sizes[row] = sizes

    wrong = {row: reason for row, reason in unread.items() if reason != NO_IMAGE}
    readable = [row for row in range(len(ids)) if row not in unread]
    wrong |= failures(check, readable, num_cores())
    if wrong:
        first = min(wrong)
        raise UserError(
            f"{path}: {len(wrong)} masks cannot be used, the first is {ids[first]} "
            f"({wrong[first]}); fix them, or set --mask_weight 0"
        )
    if other_sizes and distributed.is_main():
        first = min(other_sizes)
        warn_once(
            f"{path}: {len(other_sizes)} masks differ in size from their image and are stretched, "
            f"the first is {ids[first]} ({other_sizes[first]})"
        )
    return masks


def warn_of_unmatched_masks(path: Path, ids: pl.Series, masks: PackedFiles | None) -> None:
    """Warn of masks without a row if rows without a mask exist: ids may be spelt differently.

    Args:
        ids: of the whole training table.
        masks: of the rows that are trained on.
    """
    store = open_hdf5(path)
    if store is None or masks is None or not distributed.is_main():
        return
    unmatched = np.setdiff1d(store.ids, ids.to_numpy().astype(np.str_))
    num_without = int(masks.is_empty.sum())
    if len(unmatched) and num_without:
        warn_once(
            f"{path}: {len(unmatched)} masks belong to no training row, the first is "
            f"{unmatched[0]}; {num_without} training images have no mask"
        )
