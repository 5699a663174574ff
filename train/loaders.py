"""Loaders that decode, augment and batch the rows of a fold."""

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Iterator
from multiprocessing.queues import Queue
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from isic.layout import ALL, Fold
from isic.preprocess import PreprocessSpec
from isic.runtime import interrupt
from isic.runtime.errors import UserError, first_line
from isic.runtime.interrupt import ignore_signals_in_worker
from train import distributed
from train.augmentation.pipeline import create_augmentation, seed_augmentation
from train.batch import NO_MASK, Batch
from train.config import TrainSettings
from train.decoded import DecodedImages
from train.machine import default_workers, fit_workers
from train.rows import EXTRA, TrainData
from train.sampling import (
    EpochSampler,
    HeldOutSampler,
    Key,
    RankSampler,
    create_sampler,
    epoch_pools,
    held_out_subset,
)

# The backward pass has two products for each one of the forward pass.
TRAINING_PASSES = 3
"""Forward passes that training on an image costs."""

Item = tuple[NDArray[np.uint8], np.float32, int, NDArray[np.uint8], int]
"""Image [size, size, 3], target, row number, mask [size, size], or [0, 0] if masks are unused, and
the augmentation's seed."""


class FoldLoaders(NamedTuple):
    """Both loaders of a fold, for this process's rows."""

    training: DataLoader[Item]
    sampler: EpochSampler
    """Of `training`; its `epoch` is to be set before each epoch."""
    held_out: DataLoader[Item]
    held_out_sampler: HeldOutSampler
    """Of `held_out`."""
    decoded: DecodedImages
    """The images of both."""

    def count_uses(self, settings: TrainSettings, num_finished: int) -> NDArray[np.int64]:
        """Return [N] how often this process shows each row after `num_finished` epochs."""
        sampler = cast(RankSampler, self.training.sampler)
        num_rows = len(self.decoded.slots)
        uses = np.zeros(num_rows, np.int64)
        for epoch in range(num_finished, settings.epochs):
            uses += np.bincount(sampler.rows(epoch), minlength=num_rows)
            uses[self.held_out_sampler.rows(settings.validates_all(epoch + 1))] += 1
        return uses

    def epoch_costs(self, settings: TrainSettings) -> NDArray[np.float64]:
        """Return [epochs] the approximate cost of each epoch; the mean is 1."""
        sampler = self.held_out_sampler
        num_predicted = [
            len(sampler.rows(settings.validates_all(epoch)))
            for epoch in range(1, settings.epochs + 1)
        ]
        num_trained = len(cast(RankSampler, self.training.sampler))
        passes = np.array(num_predicted, np.float64) + TRAINING_PASSES * num_trained
        return passes / float(passes.mean())


def fold_loaders(
    data: TrainData,
    fold: Fold,
    spec: PreprocessSpec,
    settings: TrainSettings,
    device: torch.device,
) -> FoldLoaders:
    """Create the loaders of a fold; ALL has no held-out rows.

    Raises:
        UserError: the training or the held-out rows lack a class, or are fewer than the processes.
    """
    is_held_out = data.is_held_out(fold)
    training = np.flatnonzero(~is_held_out & (data.fold != EXTRA))
    held_out = np.flatnonzero(is_held_out)
    rank = distributed.rank()
    world_size = distributed.world_size()
    check_rows(data.target[training], f"training rows of fold {fold}", world_size)
    if fold != ALL:
        check_rows(data.target[held_out], f"held-out rows of fold {fold}", world_size)

    pools = epoch_pools(data, training, settings)
    sampler = create_sampler(pools, settings, fold, world_size)
    subset = held_out_subset(held_out, data.target[held_out], settings.split_seed)
    held_out_sampler = HeldOutSampler(held_out, subset, rank, world_size)
    decoded = DecodedImages(data.rows, spec)
    on_device = settings.augment_on == "device"
    augmentation = None if on_device else create_augmentation(settings.augmentation)
    images = LesionImages(data.target, decoded, augmentation)
    held_out_images = LesionImages(data.target, decoded)
    batch_size = settings.batch_size
    num_channels = 4 if settings.mask_weight else 3  # a mask is as large as one colour channel
    num_workers, num_prefetched = fit_workers(
        default_workers(device) if settings.num_workers is None else settings.num_workers,
        batch_bytes=batch_size * spec.size**2 * num_channels,
        num_held=settings.accumulation_steps + 1,  # those of a step, and the next one
    )
    workers = {"num_workers": num_workers, "num_prefetched": num_prefetched}
    return FoldLoaders(
        create_loader(
            images, RankSampler(sampler, batch_size, rank, world_size), batch_size, **workers
        ),
        sampler,
        create_loader(held_out_images, held_out_sampler, batch_size, **workers),
        held_out_sampler,
        decoded,
    )


def check_rows(target: NDArray[np.float32], name: str, world_size: int) -> None:
    """Raise a UserError if rows hold only one class or are fewer than the processes."""
    if len(np.unique(target)) < 2:
        raise UserError(f"the {name} hold only one class; use more data or fewer folds")
    if len(target) < world_size:
        raise UserError(
            f"the {len(target)} {name} are too few for {world_size} processes; start fewer"
        )


class LesionImages(Dataset[Item]):
    """Rows of the training table, augmented."""

    def __init__(
        self,
        target: NDArray[np.float32],
        decoded: DecodedImages,
        augmentation: Any | None = None,
    ) -> None:
        self.target = target
        self.decoded = decoded
        self.augmentation = augmentation

    def __getitem__(self, key: Key) -> Item:
        row, seed = key
        pixels = self.decoded[row]
        if self.augmentation is not None:
            seed_augmentation(self.augmentation, seed)
            # Transforms may write into their input.
            pixels = self.augmentation(**{name: part.copy() for name, part in pixels.items()})
        return pixels["image"], self.target[row], row, pixels.get("mask", self._no_mask()), seed

    def _no_mask(self) -> NDArray[np.uint8]:
        size = 0 if self.decoded.mask_files is None else self.decoded.spec.size
        return np.full((size, size), NO_MASK, np.uint8)


def create_loader(
    images: LesionImages,
    sampler: Sampler[Key],
    batch_size: int,
    num_workers: int,
    num_prefetched: int,
) -> DataLoader[Item]:
    """Create a loader of `Batch`es; each of its workers prefetches `num_prefetched` of them."""
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=cast(Any, sampler),
        collate_fn=collate,
        num_workers=num_workers,
        # Forked workers share the images; Python 3.14 would start others, with copies.
        multiprocessing_context="fork" if num_workers else None,
        prefetch_factor=num_prefetched if num_workers else None,
        persistent_workers=num_workers > 0,  # starting them again costs seconds per epoch
        # Copies from pinned memory to the GPU do not block the host.
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=init_worker,
    )


def collate(items: list[Item]) -> Batch:
    return Batch(*default_collate(items))


class TimedLoader:
    """Iterates over batches and adds up the seconds spent waiting for them."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        # iter() starts the workers; an interrupt in the middle of a fork would be lost.
        with interrupt.defer_signals():
            batches = iter(self.loader)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch


def init_worker(index: int) -> None:
    """Prepare a loader worker for signals and for a batch that cannot be sent."""
    ignore_signals_in_worker(index)
    # Python's hook for a queue that cannot send an item; it is replaced in this process only.
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, _: object) -> None:
    """End a worker that cannot send a batch, for which the loader would wait forever."""
    if "shared memory" in str(error):
        # As torch's workers end if the memory is missing a moment later: the loader reports it.
        signal.raise_signal(signal.SIGBUS)
    traceback.print_exception(error)
    os._exit(1)


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Turn torch's errors about a dead worker or a lack of shared memory into a UserError."""
    try:
        yield
    except (RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError) as error:
        interrupt.raise_if_interrupted()  # if a signal ended the workers too, it is the cause
        reason = first_line(error).rstrip(".")
        # torch's error about a dead worker may hide the signal that killed it in its cause.
        lacks_memory = "shared memory" in f"{error} {error.__cause__} {error.__context__}"
        # All but RuntimeError: a dead worker's batch could not be received.
        has_ended = not isinstance(error, RuntimeError) or "DataLoader worker (pid" in reason
        if not lacks_memory and not has_ended:
            raise
        # torch's handler would raise again for each worker that exits while the loader is deleted.
        # Seen with torch 2.14; no report found. Remove it once the test passes without.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if lacks_memory:
            raise UserError(
                "the image-decoding workers ran out of shared memory in /dev/shm; enlarge it "
                "(docker run --shm-size) or lower --num_workers"
            ) from error
        raise UserError(
            f"an image-decoding worker died ({reason}), possibly for lack of memory; lower "
            "--num_workers and continue with --resume"
        ) from error
