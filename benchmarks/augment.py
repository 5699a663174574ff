"""`python -m benchmarks augment`: images per second of a core that decodes and augments."""

import mmap
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import count, islice

import cv2
import numpy as np
import torch

from benchmarks.computed import SOURCES
from benchmarks.record import Row, print_and_append
from benchmarks.settings import AugmentSettings
from isic import schema
from isic.dataset import Dataset
from isic.preprocess import PreprocessSpec
from isic.runtime.errors import UserError
from train.augmentation.device import DeviceAugmentation
from train.augmentation.levels import DEVICE_LEVELS, LEVELS
from train.augmentation.pipeline import create_augmentation
from train.batch import Batch
from train.decoded import DecodedImages
from train.loaders import LesionImages, collate
from train.packed import read_packed
from train.rows import Rows
from train.sampling import Key

FILES, KEPT = SOURCES
ON_DEVICE = "a batch, by torch"
"""Source of images that are only augmented."""
CPU = torch.device("cpu")
SEEDS = 1_000_000
"""Seeds of a repeat."""

Work = Callable[[Sequence[Key]], object]
"""Makes the batch of some keys."""


def augment(settings: AugmentSettings) -> None:
    """Run `benchmarks augment`, which its settings describe."""
    # One thread, as in a loader process.
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    files = read_images(settings)
    kept = read_images(settings)
    rows = np.arange(len(kept.slots))
    kept.keep(rows, mmap.mmap(-1, len(rows) * kept.row_bytes))
    works = {
        (level, source): loading(decoded, level)
        for source, decoded in ((FILES, files), (KEPT, kept))
        for level in LEVELS
    }
    works |= {(level, ON_DEVICE): augmenting(kept, level, settings) for level in DEVICE_LEVELS}
    rates = measure_rates(works, len(rows), settings)
    results = [_row(*key, own, settings) for key, own in rates.items()]
    print(f"appended to {print_and_append('augment', results, settings.results)}")


def read_images(settings: AugmentSettings) -> DecodedImages:
    """Return the first images of a dataset, undecoded.

    Raises:
        UserError: one of them cannot be read.
    """
    dataset = Dataset(settings.data)
    table = dataset.metadata("train")[: settings.images]
    packed, failed = read_packed(dataset.images("train"), table[schema.ID].to_list())
    if failed:
        raise UserError(f"an image cannot be read ({next(iter(failed.values()))}); run isic check")
    return DecodedImages(Rows(table, packed, None), PreprocessSpec(size=settings.size))


def loading(decoded: DecodedImages, level: str) -> Work:
    """Return the work of a loader process."""
    target = np.zeros(len(decoded.slots), np.float32)
    images = LesionImages(target, decoded, create_augmentation(level))
    return lambda keys: collate([images[key] for key in keys])


def augmenting(decoded: DecodedImages, level: str, settings: AugmentSettings) -> Work:
    """Return the work of the device, on a batch that is there already."""
    size = min(settings.batch, len(decoded.slots))
    batch = loading(decoded, "none")([(row, row) for row in range(size)])
    assert isinstance(batch, Batch)
    on_device = DeviceAugmentation(LEVELS[level], CPU)
    return lambda keys: on_device(Batch(*(part[: len(keys)] for part in batch)))


def measure_rates(
    works: dict[tuple[str, str], Work], num_rows: int, settings: AugmentSettings
) -> dict[tuple[str, str], list[float]]:
    """Return images per second of CPU time by work and repeat, after one warm-up of each."""
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in works}
    for repeat in range(settings.repeats + 1):
        for name, work in works.items():
            rate = cpu_rate(work, num_rows, settings.batch, settings.seconds, repeat * SEEDS)
            if repeat:
                rates[name].append(rate)
    return rates


def cpu_rate(work: Work, num_rows: int, batch: int, seconds: float, first_seed: int) -> float:
    """Return images per second of this process's CPU time, over whole batches."""
    keys = ((number % num_rows, number) for number in count(first_seed))
    done = 0
    started = time.process_time()
    while (spent := time.process_time() - started) < seconds:
        chosen = list(islice(keys, batch))
        work(chosen)
        done += len(chosen)
    return done / spent


def _row(level: str, source: str, rates: Sequence[float], settings: AugmentSettings) -> Row:
    return {
        "what": level,
        "source": source,
        "size": settings.size,
        "batch": settings.batch,
        "images_per_second": round(statistics.median(rates)),
        "min": round(min(rates)),
        "max": round(max(rates)),
    }
