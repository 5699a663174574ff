"""Rows and pixels for the loop: JPEG bytes in one buffer, a sampler that redraws negatives, loaders."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from isic import schema
from isic.dataset import Dataset as IsicDataset
from isic.errors import UserError
from isic.files import atomic_path
from isic.folds import FILE as FOLDS_FILE
from isic.folds import Folds, folds_for
from isic.images import ImageStore, decode_pool
from isic.preprocess import ImageError, PreprocessSpec, decode, resize
from train.augment import create_augmentation
from train.config import TrainSettings

SAMPLE_ROWS = 50_000
READ_ROWS = 4096

Item = tuple[NDArray[np.uint8], np.float32, int]
Batch = tuple[Tensor, Tensor, Tensor]
Key = tuple[int, int]
"""A row and the seed of its augmentation."""


@dataclass(frozen=True)
class Jpegs:
    """The image files of N rows in one buffer. Worker processes share it; a list of bytes would be copied into each."""

    buffer: NDArray[np.uint8]
    starts: NDArray[np.int64]
    """[N + 1]: row i is buffer[starts[i]:starts[i + 1]]."""

    def __getitem__(self, row: int) -> bytes:
        return self.buffer[self.starts[row] : self.starts[row + 1]].tobytes()


def read_jpegs(store: ImageStore, ids: list[str]) -> Jpegs:
    """Reads the image files of `ids` into one buffer. Raises UserError where one has none."""
    parts, sizes = [], []
    for start in range(0, len(ids), READ_ROWS):
        files = store.read(ids[start : start + READ_ROWS])
        parts.append(np.frombuffer(b"".join(files), dtype=np.uint8))
        sizes += [len(file) for file in files]
    return Jpegs(np.concatenate(parts), np.cumsum([0, *sizes]))


@dataclass(frozen=True)
class TrainData:
    """The rows a run trains and validates on, their files and their folds."""

    table: pl.DataFrame
    fold: NDArray[np.int8]
    jpegs: Jpegs
    folds: Folds
    metadata_path: Path

    @property
    def target(self) -> NDArray[np.float32]:
        return self.table[schema.TARGET].to_numpy().astype(np.float32)


def load_data(settings: TrainSettings) -> TrainData:
    """Reads the training table, its fold plan and its images, every one of which is decoded once to see that it can be.

    Raises:
        UserError: anything wrong with the dataset; with `on_error=skip`, rows without a usable image are left out
            and listed in `errors.parquet` instead.
    """
    dataset = IsicDataset(settings.data)
    table = dataset.metadata("train")
    folds = folds_for(table, settings.num_folds, settings.split_seed, settings.run_dir / FOLDS_FILE, dataset.folds_path)
    if settings.use_sample:
        table = sample_rows(table, SAMPLE_ROWS, settings.split_seed)
    store = dataset.images("train")
    ids = table[schema.ID].to_list()
    errors = dict.fromkeys(store.missing(ids), "no image for this id")
    present = [name for name in ids if name not in errors]
    jpegs = read_jpegs(store, present)
    errors |= {present[row]: reason for row, reason in undecodable(jpegs, len(present)).items()}
    if errors:
        _report(errors, len(ids), settings)
        table = table.filter(~pl.col(schema.ID).is_in(list(errors)))
        jpegs = read_jpegs(store, table[schema.ID].to_list())
    return TrainData(table, folds.of(table).to_numpy(), jpegs, folds, dataset.metadata_path("train"))


def undecodable(jpegs: Jpegs, num_rows: int) -> dict[int, str]:
    """Returns the reason by row for every file that does not decode.

    A run of hours should not end at a broken file; looking at all of them first takes a ten-thousandth of a second
    each and core.
    """

    def reason(row: int) -> str | None:
        try:
            decode(jpegs[row])
        except ImageError as error:
            return str(error)
        return None

    with decode_pool(os.cpu_count() or 1) as pool:
        reasons = pool.map(reason, range(num_rows), chunksize=READ_ROWS)
        return {row: text for row, text in enumerate(reasons) if text is not None}


def _report(errors: dict[str, str], num_rows: int, settings: TrainSettings) -> None:
    first, reason = next(iter(errors.items()))
    summary = f"{len(errors)} of {num_rows} images cannot be used, the first is {first} ({reason})"
    if settings.on_error == "raise":
        raise UserError(f"{summary}; mend them, or leave their rows out with --on_error skip")
    path = settings.run_dir / "errors.parquet"
    with atomic_path(path) as temporary:
        pl.DataFrame({schema.ID: list(errors), "reason": list(errors.values())}).write_parquet(temporary)
    print(f"{summary}; their rows are left out and listed in {path}")


def sample_rows(table: pl.DataFrame, num_rows: int, seed: int) -> pl.DataFrame:
    """Returns about `num_rows` rows that keep every positive, in the table's order."""
    negatives = table.filter(pl.col(schema.TARGET) == 0)
    num_negatives = num_rows - (len(table) - len(negatives))
    if num_negatives >= len(negatives):
        return table
    kept = negatives.sample(max(num_negatives, 1), seed=seed)[schema.ID]
    return table.filter((pl.col(schema.TARGET) == 1) | pl.col(schema.ID).is_in(kept.implode()))


class LesionImages(Dataset[Item]):
    """Decoded rows: uint8 [size, size, 3], the target, and the row's number."""

    def __init__(self, data: TrainData, spec: PreprocessSpec, augmentation: Any | None = None) -> None:
        self.jpegs, self.target = data.jpegs, data.target
        self.spec, self.augmentation = spec, augmentation

    def __getitem__(self, key: Key) -> Item:
        row, seed = key
        image = resize(decode(self.jpegs[row]), self.spec)
        if self.augmentation is not None:
            self.augmentation.set_random_seed(seed)
            image = self.augmentation(image=image)["image"]
        return image, self.target[row], row


class EpochSampler(Sampler[Key]):
    """Draws an epoch's rows: every positive `positive_repeats` times, negatives anew, all shuffled.

    What is drawn, and the seed of each row's augmentation, depend on the seed and the epoch alone, not on how many
    workers there are or whether an earlier epoch was run in this process.
    """

    def __init__(
        self, rows: NDArray[np.int64], target: NDArray[np.float32], settings: TrainSettings, epoch: int = 0
    ) -> None:
        self.positives, self.negatives = rows[target == 1], rows[target == 0]
        self.repeats, self.seed, self.epoch = settings.positive_repeats, settings.seed, epoch
        per_positive = settings.negatives_per_positive
        wanted = len(self.negatives) if per_positive is None else round(per_positive * len(self.positives))
        self.num_negatives = min(wanted, len(self.negatives))

    def __len__(self) -> int:
        return self.repeats * len(self.positives) + self.num_negatives

    def __iter__(self) -> Iterator[Key]:
        random = np.random.default_rng((self.seed, self.epoch))
        negatives = random.choice(self.negatives, self.num_negatives, replace=False)
        rows = random.permutation(np.concatenate([np.tile(self.positives, self.repeats), negatives]))
        seeds = random.integers(2**31, size=len(rows))
        return iter(zip(rows.tolist(), seeds.tolist(), strict=True))


class RowSampler(Sampler[Key]):
    """Every row once, in order."""

    def __init__(self, rows: NDArray[np.int64]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Key]:
        return iter((int(row), 0) for row in self.rows)


def create_loader(
    images: LesionImages, sampler: Sampler[Key], settings: TrainSettings, drop_last: bool
) -> DataLoader[Item]:
    """Returns a loader of batches (uint8 [N, size, size, 3], float32 [N], int64 [N] rows)."""
    return DataLoader(
        images,
        batch_size=settings.batch_size,
        sampler=cast(Any, sampler),
        drop_last=drop_last,
        num_workers=settings.num_workers,
        persistent_workers=settings.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def fold_loaders(
    data: TrainData, fold: int, spec: PreprocessSpec, settings: TrainSettings
) -> tuple[DataLoader[Item], EpochSampler, DataLoader[Item]]:
    """Returns the training loader, its sampler (whose epoch the loop sets), and the validation loader of a fold.

    Raises:
        UserError: the training or the held-out rows lack a class.
    """
    training, held_out = np.flatnonzero(data.fold != fold), np.flatnonzero(data.fold == fold)
    for rows, name in ((training, "training"), (held_out, "held-out")):
        if len(np.unique(data.target[rows])) < 2:
            raise UserError(f"the {name} rows of fold {fold} hold one class only; use more data or fewer folds")
    sampler = EpochSampler(training, data.target[training], settings)
    augmented = LesionImages(data, spec, create_augmentation(settings.augmentation))
    full_batches = len(sampler) >= settings.batch_size
    return (
        create_loader(augmented, sampler, settings, drop_last=full_batches),
        sampler,
        create_loader(LesionImages(data, spec), RowSampler(held_out), settings, drop_last=False),
    )
