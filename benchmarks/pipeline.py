"""`python -m benchmarks pipeline`: the embedding pipeline around an engine, with stand-ins.

The engine is timed like a GPU, and decoding can be a sleep of the same length, so that two cores
show what sixteen would do: the control thread's own time, and how decoders get in its way.
"""

import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl

from benchmarks.computed import CORES
from benchmarks.record import Row, print_and_append
from benchmarks.settings import PipelineSettings
from benchmarks.timing import batches, repeated
from infer.embedding.decoders import DECODERS, DecoderProcesses, Decoders, DecoderThreads, Recipe
from infer.embedding.embedder import Embedder, EmbedJob
from infer.embedding.models import Models
from infer.embedding.pipeline import DecodeAhead, num_slots
from infer.embedding.progress import Progress
from infer.embedding.ring import Ring
from infer.embedding.settings import DecodeIn
from infer.embedding.shards import plan_shards
from infer.engines import Engine, Outputs
from infer.engines.null import NullEngine
from isic.dataset import Dataset
from isic.images import Hdf5Images
from isic.layout import Fold
from isic.metadata import read_ids
from isic.preprocess import Pixels, PreprocessSpec

SPEC = PreprocessSpec(size=224)
BATCH = 256
NUM_FEATURES = (192, 768)
DECODE_SECONDS = 80e-6
RESIZE_SECONDS = 85e-6
"""The time of OpenCV's calls for a crop, at 224 px on one core."""
SLACK = 29
"""Linux's option PR_SET_TIMERSLACK; by default a sleep takes some 50 microseconds longer."""
INTERPRETERS = 4
"""Processes that share the workers in the comparison with one process of threads."""


def pipeline(settings: PipelineSettings) -> None:
    """Run `benchmarks pipeline`, which its settings describe."""
    images = Dataset(settings.data).images("train")
    assert isinstance(images, Hdf5Images)
    ids = read_ids(Dataset(settings.data).metadata_path("train"))
    for rows in (decoding_rows, control_rows, engine_rows):
        for what, columns in rows(images.source, ids, settings):
            row = {"what": what, "data": settings.data.name, **columns}
            print_and_append("pipeline", [row], settings.results)


# Decoders that sleep


class SleepingImages(Hdf5Images):
    """Images whose decoding is a sleep, after and before the Python code of the real one."""

    seconds = (DECODE_SECONDS, RESIZE_SECONDS)

    def decode(self, *arguments: Any, **options: Any) -> dict[int, str]:
        put_opencv_to_sleep(*self.seconds)
        return super().decode(*arguments, **options)


class NoImages(SleepingImages):
    """Images that are decoded in no time."""

    seconds = (0.0, 0.0)


def put_opencv_to_sleep(decode_seconds: float, resize_seconds: float) -> None:
    """Replace OpenCV's two calls for an image in this process."""
    ctypes.CDLL(None).prctl(SLACK, 1)
    image = np.zeros((130, 130, 3), np.uint8)
    cv2.imdecode = partial(_sleep, decode_seconds, image)
    cv2.resize = partial(_sleep, resize_seconds, image)  # type: ignore[assignment]


def _sleep(seconds: float, image: Pixels, *_: object, **__: object) -> Pixels:
    if seconds:
        time.sleep(seconds)
    return image


# Decoding alone


@dataclass(frozen=True)
class Rate:
    """A run of a pipeline."""

    images: int
    seconds: float
    cpu: float
    """Seconds of the whole process that has the engine."""
    control: float
    """Seconds of CPU time of the thread that feeds the engine."""

    @property
    def columns(self) -> Row:
        return {
            "images_per_second": round(self.images / self.seconds),
            "cpu_us": round(1e6 * self.cpu / self.images, 2),
            "control_us": round(1e6 * self.control / self.images, 2),
        }


def timed(images: int, work: Callable[[], object]) -> Rate:
    """Run some work on so many images and return its rate."""
    clocks = (time.perf_counter, time.process_time, time.thread_time)
    started = [clock() for clock in clocks]
    work()
    return Rate(images, *(clock() - start for clock, start in zip(clocks, started, strict=True)))


def decoding_rows(
    path: Path, ids: pl.Series, settings: PipelineSettings
) -> Iterator[tuple[str, Row]]:
    """Yield the rates of decoders that sleep, and of some that take no time."""
    names = repeated(ids.to_list(), settings.images)
    for number in settings.workers:
        for decode_in, kind in DECODERS.items():
            with Stream(kind, SleepingImages(path), number) as stream:
                yield (
                    f"decoding by {counted(number, decode_in)}, a sleep",
                    stream.measure(names).columns,
                )
        if number >= INTERPRETERS:
            rate = rate_of_interpreters(path, names, number // INTERPRETERS)
            threads = counted(number // INTERPRETERS, "threads")
            what = f"decoding by {INTERPRETERS} interpreters of {threads}, a sleep"
            yield what, rate.columns
        with Stream(DecoderProcesses, NoImages(path), number) as stream:
            yield (
                f"decoding by {counted(number, 'processes')}, in no time",
                stream.measure(names).columns,
            )


def counted(number: int, noun: str) -> str:
    """Return a number and a noun, which is given in the plural."""
    singular = {"threads": "thread", "processes": "process"}
    return f"{number} {singular[noun] if number == 1 else noun}"


class Stream:
    """Decoders and a ring without an engine; a context manager that ends the decoders."""

    def __init__(self, kind: type[Decoders], store: Hdf5Images, number: int) -> None:
        ring = Ring((num_slots(BATCH, kind, number), BATCH, SPEC.size, SPEC.size, 3))
        self._slots = ring.slots
        self._decoders = kind(store, Recipe(SPEC, "none"), ring, number)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._decoders.close()

    def measure(self, names: Sequence[str]) -> Rate:
        """Return the rate of decoding images, after some of warm-up."""
        self._read(names[: BATCH * len(self._slots)])
        return timed(len(names), partial(self._read, names))

    def _read(self, names: Sequence[str]) -> None:
        stream = DecodeAhead(self._decoders, self._slots, batches(names, BATCH))
        for batch in stream:
            stream.release(batch)


def rate_of_interpreters(path: Path, names: Sequence[str], num_threads: int) -> Rate:
    """Return the rate of several processes, each of which decodes its share in threads."""
    context = get_context("spawn")
    barrier = context.Barrier(INTERPRETERS)
    with ProcessPoolExecutor(INTERPRETERS, context, _set_barrier, (barrier,)) as pool:
        runs = [
            pool.submit(_read_share, path, names[share::INTERPRETERS], num_threads)
            for share in range(INTERPRETERS)
        ]
        rates = [run.result() for run in runs]
    return Rate(
        sum(rate.images for rate in rates),
        max(rate.seconds for rate in rates),
        sum(rate.cpu for rate in rates),
        sum(rate.control for rate in rates),
    )


_barriers: list[Barrier] = []


def _set_barrier(barrier: Barrier) -> None:
    _barriers.append(barrier)


def _read_share(path: Path, names: Sequence[str], num_threads: int) -> Rate:
    with Stream(DecoderThreads, SleepingImages(path), num_threads) as stream:
        stream.measure(names[:BATCH])
        _barriers[0].wait()
        return timed(len(names), partial(stream._read, names))


# The pipeline with an engine


class FreeEngine(Engine):
    """An engine whose results are there at once, as a copy of memory that a GPU has filled."""

    device = "none"
    folds = (0,)

    def __init__(self, num_features: int) -> None:
        self._features = np.zeros((BATCH, num_features), np.float16)
        self._logits = np.zeros((BATCH, 1), np.float32)

    def submit(self, images: Pixels, folds: Iterable[Fold] | None = None) -> "FreePending":
        return FreePending(self._features[: len(images)], self._logits[: len(images)])

    def close(self) -> None:
        """Nothing to end."""


class FreePending:
    """A batch of the free engine."""

    def __init__(self, *outputs: Any) -> None:
        self._outputs = outputs

    def result(self) -> dict[Fold, Outputs]:
        features, logits = (output.copy() for output in self._outputs)
        return {0: (features, logits)}


def control_rows(
    path: Path, ids: pl.Series, settings: PipelineSettings
) -> Iterator[tuple[str, Row]]:
    """Yield the cost of the control thread per image, if decoding and the engine take no time."""
    ids = pl.Series(repeated(ids.to_list(), settings.images))
    for num_features in NUM_FEATURES:
        runs = [
            embedded(FreeEngine(num_features), NoImages(path), ids, num_features, "processes", 2)
            for _ in range(settings.repeats)
        ]
        control = statistics.median(run.control for run in runs)
        rate = min(runs, key=lambda run: abs(run.control - control))
        yield f"control thread, {num_features} features", rate.columns


def engine_rows(
    path: Path, ids: pl.Series, settings: PipelineSettings
) -> Iterator[tuple[str, Row]]:
    """Yield the share of an engine's own rate that is reached end to end."""
    for rate in settings.rates:
        number = min(max(settings.workers), CORES)
        for decode_in in DECODERS:
            wanted = pl.Series(repeated(ids.to_list(), round(rate * settings.seconds)))
            run = embedded(
                NullEngine([0], 192, rate), SleepingImages(path), wanted, 192, decode_in, number
            )
            share = run.images / run.seconds / rate
            what = f"engine of {rate:,} images/s, {counted(number, decode_in)}"
            yield what, {**run.columns, "share": round(share, 4)}


def embedded(
    engine: Engine,
    store: Hdf5Images,
    ids: pl.Series,
    num_features: int,
    decode_in: DecodeIn,
    number: int,
) -> Rate:
    """Return the rate of embedding images to shards on disk, with so many decoders."""
    manifest = {"num_features": num_features, "fold": 0}
    models = Models({0: Path()}, {0: manifest}, SPEC)
    job = EmbedJob(
        Path(), "train", models, "cpu", "float16", "none", BATCH, number, None, decode_in
    )
    with tempfile.TemporaryDirectory() as folder, Embedder(job, engine, store) as embedder:
        # Enough images for every decoder to have started.
        first = ids[: BATCH * number]
        warm_up = plan_shards(Path(folder) / "first", "train", first, [0], None, "all")
        embedder.run(warm_up, lambda stats: None)
        shards = plan_shards(Path(folder) / "run", "train", ids, [0], None, "all")
        progress = Progress(shards, "raise", max_bad=0, quiet=True)
        return timed(len(ids), partial(embedder.run, shards, progress.add))
