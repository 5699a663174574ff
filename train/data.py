"""Rows and pixels for the loop: JPEG bytes in one buffer, a sampler that redraws negatives, loaders."""

import contextlib
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from isic import schema
from isic.dataset import Dataset as IsicDataset
from isic.folds import FILE as FOLDS_FILE
from isic.folds import Folds, folds_for
from isic.images import NO_IMAGE, ImageStore, failures, open_hdf5
from isic.preprocess import MASK_THRESHOLD, PreprocessSpec, check_mask, decode, resize
from isic.runtime import interrupt
from isic.runtime.errors import UserError, warn, warn_once
from isic.runtime.files import write_parquet
from isic.runtime.interrupt import ignore_signals_in_worker
from isic.runtime.machine import num_cores
from train import distributed
from train.augment import create_augmentation
from train.config import TrainSettings
from train.machine import default_workers, fit_workers, select_device

ERRORS_FILE = "errors.parquet"
SAMPLE_ROWS = 50_000
READ_ROWS = 4096

EXTRA = -1
"""Fold of the rows of further datasets, which are never held out."""
NO_MASK = 255
"""Value of every pixel of a mask that an image does not have; the others are 0 and 1."""

Item = tuple[NDArray[np.uint8], np.float32, int, NDArray[np.uint8]]
Key = tuple[int, int]
"""A row and the seed of its augmentation."""


class Batch(NamedTuple):
    """N rows as the loop takes them."""

    images: Tensor
    """uint8 [N, size, size, 3] RGB; once mixed, float32."""
    target: Tensor
    """float32 [N]."""
    rows: Tensor
    """int64 [N]: where they stand in the table."""
    masks: Tensor = torch.empty(0)
    """uint8 [N, size, size], 1 in the lesion and NO_MASK where an image has none; empty without segmentation."""


@dataclass(frozen=True)
class Jpegs:
    """The image files of N rows in one buffer. Worker processes share it; a list of bytes would be copied into each."""

    buffer: NDArray[np.uint8]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    """[N] each: row i is buffer[starts[i]:ends[i]]."""

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> bytes:
        return self.buffer[self.starts[row] : self.ends[row]].tobytes()

    def __add__(self, other: "Jpegs") -> "Jpegs":
        before = len(self.buffer)
        return Jpegs(
            np.concatenate([self.buffer, other.buffer]),
            np.concatenate([self.starts, before + other.starts]),
            np.concatenate([self.ends, before + other.ends]),
        )

    def without(self, rows: Iterable[int]) -> "Jpegs":
        """Returns the other rows; the buffer stays as it is."""
        kept = np.delete(np.arange(len(self)), list(rows))
        return Jpegs(self.buffer, self.starts[kept], self.ends[kept])


def read_jpegs(store: ImageStore, ids: list[str]) -> tuple[Jpegs, dict[int, str]]:
    """Reads the image files of `ids` into one buffer.

    Returns:
        The files, and the reason by row for every image that is absent or cannot be read; its file is empty.
    """
    buffer = bytearray()  # it grows in place: no file is held twice
    sizes: list[int] = []
    failed: dict[int, str] = {}
    for start in range(0, len(ids), READ_ROWS):
        files, reasons = store.read_each(ids[start : start + READ_ROWS])
        buffer += b"".join(files)
        sizes += map(len, files)
        failed.update((start + row, reason) for row, reason in reasons.items())
    ends = np.cumsum(sizes, dtype=np.int64)
    files_of_rows = Jpegs(
        np.frombuffer(buffer, dtype=np.uint8), ends - np.array(sizes, np.int64), ends
    )
    return files_of_rows, failed


@dataclass(frozen=True)
class Rows:
    """Rows of one dataset, all of which have an image that decodes."""

    table: pl.DataFrame
    """`isic_id`, `target` and, where the dataset knows it, `patient_id`."""
    jpegs: Jpegs
    masks: Jpegs | None
    """PNG files, empty for a row without one; None where the run takes no notice of masks."""

    def __add__(self, other: "Rows") -> "Rows":
        masks = self.masks + other.masks if self.masks and other.masks else None
        table = pl.concat([self.table, other.table], how="diagonal")
        return Rows(table, self.jpegs + other.jpegs, masks)


@dataclass(frozen=True)
class TrainData:
    """The rows a run trains and validates on, their files and their folds."""

    rows: Rows
    fold: NDArray[np.int8]
    """[N]: EXTRA for the rows of further datasets."""
    source: NDArray[np.int16]
    """[N]: number of the dataset in `metadata_paths`; 0 is the one that is validated on."""
    folds: Folds
    metadata_paths: list[Path]
    """The training table, and those of further datasets."""

    @property
    def table(self) -> pl.DataFrame:
        return self.rows.table

    @property
    def target(self) -> NDArray[np.float32]:
        return self.table[schema.TARGET].to_numpy().astype(np.float32)


def load_data(settings: TrainSettings) -> TrainData:
    """Reads the training table, its fold plan and its images, every one of which is decoded once to see that it can be.

    Raises:
        UserError: anything wrong with a dataset; with `on_error=skip`, rows without a usable image are left out
            and listed in `errors.parquet` instead.
    """
    dataset = IsicDataset(settings.data)
    table = dataset.metadata("train")
    path = settings.run_dir / FOLDS_FILE
    folds = folds_for(table, settings.num_folds, settings.split_seed, path, dataset.folds_path)
    chosen = sample_rows(table, SAMPLE_ROWS, settings.split_seed) if settings.use_sample else table
    rows = load_rows(dataset, chosen, settings)
    warn_of_unmatched_masks(dataset.masks_path, table[schema.ID], rows)
    fold = folds.of(rows.table).to_numpy()
    paths = [dataset.metadata_path("train")]
    sizes = [len(rows.table)]
    for root in settings.extra_data:
        extra = IsicDataset(root)
        further = load_rows(
            extra, unrelated(extra.metadata("train"), [table, rows.table], root), settings
        )
        check_classes(further.table, root, settings.negatives_per_positive)
        rows += further
        paths.append(extra.metadata_path("train"))
        sizes.append(len(further.table))
    if rows.masks and not len(rows.masks.buffer):
        raise UserError(
            f"{dataset.masks_path} has no mask of any training image; add masks, or set --mask_weight 0"
        )
    fold = np.concatenate([fold, np.full(len(rows.table) - len(fold), EXTRA, np.int8)])
    source = np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)
    return TrainData(rows, fold, source, folds, paths)


def check_classes(table: pl.DataFrame, root: Path, negatives_per_positive: float | None) -> None:
    """Warns of a further dataset of one class: whether an image is of that dataset then tells its class.

    Raises:
        UserError: it has no positive to which `negatives_per_positive` negatives could be drawn.
    """
    classes = table[schema.TARGET].unique().to_list()
    if classes == [0] and negatives_per_positive is not None:
        raise UserError(
            f"{root}: none of the {len(table)} rows is positive, so no negatives can be drawn by "
            f"--negatives_per_positive {negatives_per_positive:g}; remove it from --extra_data"
        )
    if len(classes) == 1 and distributed.is_main():
        warn(
            f"{root}: the target of all {len(table)} rows is {classes[0]}; the network can learn to "
            "recognise this dataset instead of lesions",
        )


def unrelated(table: pl.DataFrame, others: list[pl.DataFrame], root: Path) -> pl.DataFrame:
    """Returns the rows of a further dataset whose image and patient stand in none of the others.

    A patient who is trained on here and held out there would make the out-of-fold scores too good.
    """
    kept = table
    for other in others:
        for key in (schema.ID, schema.PATIENT):
            if key in kept.columns and key in other.columns:
                kept = kept.filter(
                    ~pl.col(key).is_in(other[key].drop_nulls().implode()).fill_null(False)
                )
    if len(kept) < len(table) and distributed.is_main():
        print(
            f"{root}: {len(table) - len(kept)} rows are left out, their image or patient stands in another dataset"
        )
    return kept


def load_rows(dataset: IsicDataset, table: pl.DataFrame, settings: TrainSettings) -> Rows:
    """Reads the images (and masks, if the run learns them) of a table's rows. Raises UserError."""
    table = table.select(
        name for name in (schema.ID, schema.TARGET, schema.PATIENT) if name in table.columns
    )
    ids = table[schema.ID].to_list()
    jpegs, unread = read_jpegs(dataset.images("train"), ids)
    errors = undecodable(jpegs) | unread
    if errors:
        _report({ids[row]: errors[row] for row in sorted(errors)}, len(ids), settings)
        is_good = np.ones(len(ids), bool)
        is_good[list(errors)] = False
        table, jpegs = table.filter(is_good), jpegs.without(errors)
    if not settings.mask_weight:
        return Rows(table, jpegs, None)
    return Rows(table, jpegs, load_masks(dataset.masks_path, table[schema.ID].to_list(), jpegs))


def load_masks(path: Path, ids: list[str], images: Jpegs) -> Jpegs:
    """Reads the mask files of `ids`, empty for an image without one.

    Raises:
        UserError: the file of masks, or one of the masks, cannot be used.
    """
    store = open_hdf5(path)
    if store is None:
        return Jpegs(np.empty(0, np.uint8), *np.zeros((2, len(ids)), np.int64))
    masks, unread = read_jpegs(store, ids)
    other_sizes: dict[int, str] = {}

    def look(row: int) -> None:
        if sizes := check_mask(masks[row], images[row]):
            other_sizes[row] = sizes

    wrong = {row: reason for row, reason in unread.items() if reason != NO_IMAGE}
    wrong |= failures(look, [row for row in range(len(ids)) if row not in unread], num_cores())
    if wrong:
        row, reason = next(iter(wrong.items()))
        raise UserError(
            f"{path}: {len(wrong)} masks cannot be used, the first is {ids[row]} ({reason}); "
            "fix them, or set --mask_weight 0"
        )
    if other_sizes and distributed.is_main():
        row = min(other_sizes)
        warn_once(
            f"{path}: {len(other_sizes)} masks have another size than their image and are stretched to it, "
            f"the first is {ids[row]} ({other_sizes[row]})"
        )
    return masks


def warn_of_unmatched_masks(path: Path, known: pl.Series, rows: Rows) -> None:
    """Warns of masks without a row if there are also rows without a mask: their ids may be spelt differently.

    Args:
        path: the masks of a dataset.
        known: all ids of its training table.
        rows: the rows that are trained on.
    """
    store = open_hdf5(path)
    if store is None or rows.masks is None or not distributed.is_main():
        return
    unmatched = np.setdiff1d(store.ids, known.to_numpy().astype(np.str_))
    num_without = int((rows.masks.starts == rows.masks.ends).sum())
    if len(unmatched) and num_without:
        warn_once(
            f"{path}: {len(unmatched)} masks belong to no training row, the first is {unmatched[0]}; "
            f"{num_without} training images have no mask"
        )


def undecodable(jpegs: Jpegs) -> dict[int, str]:
    """Returns the reason by row for every file that does not decode.

    A run of hours should not end at a broken file; checking all of them first takes 0.1 ms per file and core.
    """
    return failures(lambda row: decode(jpegs[row]), range(len(jpegs)), num_cores())


def _report(errors: dict[str, str], num_rows: int, settings: TrainSettings) -> None:
    first, reason = next(iter(errors.items()))
    summary = f"{len(errors)} of {num_rows} images cannot be used, the first is {first} ({reason})"
    if settings.on_error == "raise":
        raise UserError(f"{summary}; fix them, or leave their rows out with --on_error skip")
    path = settings.run_dir / ERRORS_FILE
    if not distributed.is_main():
        return
    write_parquet(path, pl.DataFrame({schema.ID: list(errors), "reason": list(errors.values())}))
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
    """Decoded rows: uint8 [size, size, 3], the target, the row's number, and the mask uint8 [size, size]."""

    def __init__(
        self, data: TrainData, spec: PreprocessSpec, augmentation: Any | None = None
    ) -> None:
        self.jpegs, self.masks, self.target = data.rows.jpegs, data.rows.masks, data.target
        self.spec, self.augmentation = spec, augmentation

    def __getitem__(self, key: Key) -> Item:
        row, seed = key
        pixels = {"image": resize(decode(self.jpegs[row]), self.spec)}
        png = self.masks[row] if self.masks else b""
        if png:
            pixels["mask"] = (resize(decode(png), self.spec)[..., 0] > MASK_THRESHOLD).astype(
                np.uint8
            )
        if self.augmentation is not None:
            self.augmentation.set_random_seed(seed)
            pixels = self.augmentation(**pixels)
        return pixels["image"], self.target[row], row, pixels.get("mask", self._no_mask())

    def _no_mask(self) -> NDArray[np.uint8]:
        size = self.spec.size if self.masks else 0
        return np.full((size, size), NO_MASK, np.uint8)


def collate(items: list[Item]) -> Batch:
    """Stacks items into a batch."""
    return Batch(*default_collate(items))


@dataclass(frozen=True)
class Pool:
    """Rows of one dataset and one class, and how many of them an epoch shows."""

    rows: NDArray[np.int64]
    num_drawn: int

    def draw(self, random: np.random.Generator) -> NDArray[np.int64]:
        """Returns `num_drawn` rows: each the same number of times, and the remainder drawn without replacement."""
        if not self.num_drawn:
            return self.rows[:0]
        times, rest = divmod(self.num_drawn, len(self.rows))
        return np.concatenate(
            [np.tile(self.rows, times), random.choice(self.rows, rest, replace=False)]
        )


def create_pools(
    rows: NDArray[np.int64],
    target: NDArray[np.float32],
    repeats: int,
    per_positive: float | None,
    weight: float = 1.0,
) -> tuple[Pool, Pool]:
    """Returns the positives and the negatives of a dataset as an epoch shows them.

    Args:
        rows: [N], numbers of the dataset's rows.
        target: [N], 0 or 1.
        repeats: how often each positive is shown.
        per_positive: negatives drawn for one positive, as many as there are; None: all.
        weight: factor of both numbers.
    """
    positives, negatives = rows[target == 1], rows[target == 0]
    wanted = len(negatives) if per_positive is None else round(per_positive * len(positives))
    return (
        Pool(positives, round(weight * repeats * len(positives))),
        Pool(negatives, round(weight * min(wanted, len(negatives)))),
    )


class EpochSampler(Sampler[Key]):
    """Draws an epoch's rows from pools, those that are not shown whole anew in each epoch, all shuffled.

    The rows, and the seed of each row's augmentation, depend on the seed and the epoch alone, not on the number of
    workers or processes or on earlier epochs in this process.
    """

    def __init__(self, pools: Sequence[Pool], seed: int, epoch: int = 0) -> None:
        self.pools, self.seed, self.epoch = pools, seed, epoch

    def __len__(self) -> int:
        return sum(pool.num_drawn for pool in self.pools)

    def __iter__(self) -> Iterator[Key]:
        random = np.random.default_rng((self.seed, self.epoch))
        rows = random.permutation(np.concatenate([pool.draw(random) for pool in self.pools]))
        seeds = random.integers(2**31, size=len(rows))
        return iter(zip(rows.tolist(), seeds.tolist(), strict=True))


class Share(Sampler[Key]):
    """One process's share of an epoch: batch for batch, all shares together are the batch that one process would take.

    An incomplete last batch is left out, as its few rows would weigh as much as a whole one, unless it is the only one.
    """

    def __init__(self, epoch: EpochSampler, batch_size: int, rank: int, world_size: int) -> None:
        self.epoch, self.rank, self.world_size = epoch, rank, world_size
        self.num_keys = len(epoch) - len(epoch) % (batch_size * world_size) or len(epoch)

    def __len__(self) -> int:
        return len(range(self.rank, self.num_keys, self.world_size))

    def __iter__(self) -> Iterator[Key]:
        return islice(iter(self.epoch), self.rank, self.num_keys, self.world_size)


class RowSampler(Sampler[Key]):
    """Every row once, in order."""

    def __init__(self, rows: NDArray[np.int64]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Key]:
        return iter((int(row), 0) for row in self.rows)


def create_loader(
    images: LesionImages, sampler: Sampler[Key], batch_size: int, workers: tuple[int, int]
) -> DataLoader[Item]:
    """Returns a loader of `Batch`es. `workers` are their number and the batches that each prefetches."""
    num_workers, prefetched = workers
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=cast(Any, sampler),
        collate_fn=collate,
        num_workers=num_workers,
        prefetch_factor=prefetched if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals_in_worker,
    )


def choose_workers(settings: TrainSettings) -> tuple[int, int]:
    """Returns the number of workers of a loader and the batches that each prefetches, as shared memory allows."""
    num_workers = settings.num_workers
    if num_workers is None:
        num_workers = default_workers(select_device(settings.device))
    channels = 4 if settings.mask_weight else 3
    return fit_workers(
        num_workers,
        settings.batch_size * settings.image_size**2 * channels,
        settings.accumulation_steps + 1,
    )


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Turns the error of torch on a worker that ended, or found no shared memory, into a UserError."""
    try:
        yield
    except (RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError) as error:
        interrupt.raise_if_interrupted()  # a signal that ended the workers too is the cause
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        lacks_memory = "shared memory" in str(error)
        # a batch that a dead worker left behind cannot be received: the other errors
        has_ended = not isinstance(error, RuntimeError) or "DataLoader worker (pid" in reason
        if not lacks_memory and not has_ended:
            raise
        # torch's handler would raise once more for each worker that ends with the loader
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if lacks_memory:
            raise UserError(
                "the workers that decode images do not find enough shared memory in /dev/shm; raise it "
                "(docker run --shm-size) or lower --num_workers"
            ) from error
        raise UserError(
            f"a worker that decodes images has ended ({reason}), maybe for lack of memory; lower --num_workers, "
            "and go on with --resume"
        ) from error


def epoch_pools(
    data: TrainData, training: NDArray[np.int64], settings: TrainSettings
) -> list[Pool]:
    """Returns positives and negatives of the training rows, then those of each further dataset.

    The ratio of classes is the same in all: negatives of one dataset and positives of another would teach the network
    to recognise datasets.
    """
    pools = list[Pool]()
    for number in range(len(data.metadata_paths)):
        rows = training if number == 0 else np.flatnonzero(data.source == number)
        pools += create_pools(
            rows,
            data.target[rows],
            settings.positive_repeats,
            settings.negatives_per_positive,
            settings.extra_weight if number else 1.0,
        )
    return pools


def report_composition(pools: Sequence[Pool], fold: int) -> None:
    """Prints how many rows of each kind an epoch shows, and warns if most are of further datasets."""
    own, further = pools[:2], pools[2:]
    num_rows = sum(pool.num_drawn for pool in pools)
    text = f"{own[0].num_drawn} positives and {own[1].num_drawn} negatives"
    if further:
        positives, negatives = (sum(pool.num_drawn for pool in further[at::2]) for at in (0, 1))
        share = (positives + negatives) / num_rows
        text += f"; of --extra_data {positives} positives and {negatives} negatives ({share:.0%})"
    print(f"fold {fold}: an epoch shows {text}", flush=True)
    if further and share > 0.5:
        warn(
            f"{share:.0%} of the rows of an epoch are of --extra_data; a lower --extra_weight shows fewer",
        )


def fold_loaders(
    data: TrainData, fold: int, spec: PreprocessSpec, settings: TrainSettings
) -> tuple[DataLoader[Item], EpochSampler, DataLoader[Item]]:
    """Returns the training loader, its sampler (whose epoch the loop sets), and the validation loader of a fold.

    Each of several processes gets loaders of its own share.

    Raises:
        UserError: the training or the held-out rows lack a class, or are fewer than the processes.
    """
    training = np.flatnonzero((data.fold != fold) & (data.fold != EXTRA))
    held_out = np.flatnonzero(data.fold == fold)
    rank, world_size = distributed.rank(), distributed.world_size()
    for rows, name in ((training, "training"), (held_out, "held-out")):
        if len(np.unique(data.target[rows])) < 2:
            raise UserError(
                f"the {name} rows of fold {fold} hold one class only; use more data or fewer folds"
            )
        if len(rows) < world_size:
            raise UserError(
                f"{len(rows)} {name} rows are too few for {world_size} processes; start fewer"
            )
    sampler = EpochSampler(epoch_pools(data, training, settings), settings.seed)
    augmented = LesionImages(data, spec, create_augmentation(settings.augmentation))
    size, workers = settings.batch_size, choose_workers(settings)
    return (
        create_loader(augmented, Share(sampler, size, rank, world_size), size, workers),
        sampler,
        create_loader(
            LesionImages(data, spec), RowSampler(held_out[rank::world_size]), size, workers
        ),
    )
