"""Embed shards in one process: decoding runs ahead of the engines, writing behind them."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.embedding.models import Models
from infer.embedding.pipeline import Decoded, decode_ahead, ring_depth
from infer.embedding.shards import Shard
from infer.embedding.store import BAD_IMAGES_SCHEMA, write_shard
from infer.embedding.views import run_averaged
from infer.engines import Outputs, allocator, load_many
from isic.dataset import Dataset, Split
from isic.images import decode_pool
from isic.runtime.arithmetic import ceil_div
from isic.runtime.errors import UserError
from isic.runtime.machine import num_cores
from isic.tables import write_parquet

# Bounds the memory if the disk is slow.
MAX_SHARDS_WAITING = 2
"""Shards that may wait to be written before the engines pause."""
STORED_DTYPES: dict[str, type[np.floating]] = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class EmbedJob:
    """Everything that a process needs to embed any shard of a run; paths are absolute."""

    data: Path
    split: Split
    models: Models
    device: str
    dtype: str
    tta: str
    batch_size: int
    num_threads: int | None
    """Decoding threads per process; None for one per core that it may use."""
    depth: int | None
    """Batches in the ring; None for as many as keep the threads busy."""
    run_spec_digest: str | None = None
    """Written into each shard."""


@dataclass(frozen=True)
class BatchStats:
    """The images of a batch and the control thread's seconds."""

    num_images: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Id and reason of each image that cannot be used."""
    decode_wait: float = 0.0
    engine: float = 0.0
    write_wait: float = 0.0


OnBatch = Callable[[BatchStats], None]


@dataclass(frozen=True)
class ShardOutputs:
    """The outputs for the N good images of a shard, and the reasons for the bad ones."""

    ids: list[str]
    features: dict[int, NDArray[np.floating]]
    """[N, D] by fold, in the type to be stored."""
    logits: dict[int, NDArray[np.float32]]
    """[N] by fold."""
    bad: dict[str, str]
    """Reason by id."""


class Embedder:
    """Embeds shards of one job. A context manager, because it owns threads."""

    def __init__(self, job: EmbedJob) -> None:
        """Load the engines and open the images. Raise UserError if either fails."""
        self._job = job
        self._engines = load_many(job.models.artifacts, job.models.manifests, job.device)
        self._store = Dataset(job.data).images(job.split)
        self._num_threads = job.num_threads or num_cores()
        self._pool = decode_pool(self._num_threads)
        self._dtype = STORED_DTYPES[job.dtype]

    def __enter__(self) -> "Embedder":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(self, shards: Sequence[Shard], on_batch: OnBatch) -> None:
        """Embed shards and write each as soon as it is complete.

        An exception from `on_batch` ends the run without a partial shard.

        Raises:
            UserError: the disk is full, or an engine returns values that are not finite.
        """
        written: deque[Future[None]] = deque()
        stream = self._decoded(shards)
        # Closed after an exception too: decoders must not write into buffers that are freed.
        with (
            contextlib.closing(stream),
            ThreadPoolExecutor(1, thread_name_prefix="write") as writer,
        ):
            for shard in shards:
                outputs = self._embed(shard, stream, on_batch)
                written.append(
                    writer.submit(write_outputs, shard, outputs, self._job.run_spec_digest)
                )
                _wait_for_writes(written, MAX_SHARDS_WAITING, on_batch)
            _wait_for_writes(written, 0, on_batch)

    def _decoded(self, shards: Sequence[Shard]) -> Generator[Decoded, None, None]:
        """Yield the decoded batches of all shards; no batch spans two shards."""
        size = self._job.batch_size
        # A generator: the ids of all shards at once would be a large list of Python strings.
        batches = (
            shard.ids.slice(start, size).to_list()
            for shard in shards
            for start in range(0, len(shard), size)
        )
        # All engines have one format and device, so their input buffers are of the same kind.
        any_engine, *_ = self._engines.values()
        depth = self._job.depth or ring_depth(size, self._num_threads)
        return decode_ahead(
            self._store,
            batches,
            self._job.models.spec,
            self._pool,
            size,
            depth,
            allocator(any_engine),
        )

    def _embed(self, shard: Shard, stream: Iterator[Decoded], on_batch: OnBatch) -> ShardOutputs:
        """Take a shard's batches from the stream and run the engines of its folds on each."""
        engines = {fold: self._engines[fold] for fold in shard.paths}
        shape = (len(shard), self._job.models.num_features)
        outputs = ShardOutputs(
            ids=[],
            features={fold: np.empty(shape, self._dtype) for fold in engines},
            logits={fold: np.empty(len(shard), np.float32) for fold in engines},
            bad={},
        )
        num_batches = ceil_div(len(shard), self._job.batch_size)
        for batch in islice(stream, num_batches):
            started = time.perf_counter()
            # Bad images are zeros; `_append` drops their outputs.
            results = run_averaged(engines, batch.images, self._job.tta)
            _append(outputs, batch, results)
            bad = [(batch.ids[row], reason) for row, reason in batch.failed.items()]
            outputs.bad.update(bad)
            seconds = time.perf_counter() - started
            on_batch(BatchStats(len(batch.ids), bad, decode_wait=batch.waited, engine=seconds))
        return _checked(outputs)


def _append(outputs: ShardOutputs, batch: Decoded, results: Mapping[int, Outputs]) -> None:
    good = [row for row in range(len(batch.ids)) if row not in batch.failed]
    start = len(outputs.ids)
    target = slice(start, start + len(good))
    for fold, (features, logits) in results.items():
        outputs.features[fold][target] = features[good]
        outputs.logits[fold][target] = logits[good, 0]
    outputs.ids.extend(batch.ids[row] for row in good)


def _checked(outputs: ShardOutputs) -> ShardOutputs:
    """Cut the arrays to the good images. Raise UserError for a value that is not finite."""
    num_good = len(outputs.ids)
    features = {fold: values[:num_good] for fold, values in outputs.features.items()}
    logits = {fold: values[:num_good] for fold, values in outputs.logits.items()}
    for fold, values in features.items():
        # After the cast: a value of a float32 engine can overflow float16.
        finite = np.isfinite(values).all(axis=1) & np.isfinite(logits[fold])
        if not finite.all():
            first = outputs.ids[int(np.argmin(finite))]
            raise UserError(
                f"the engine of fold {fold} returns values for {first} that are not finite as "
                f"{values.dtype}; use --dtype float32, or export the model in another precision"
            )
    return ShardOutputs(outputs.ids, features, logits, outputs.bad)


def _wait_for_writes(written: deque[Future[None]], max_waiting: int, on_batch: OnBatch) -> None:
    """Wait until at most `max_waiting` shards are not yet on disk."""
    started = time.perf_counter()
    while len(written) > max_waiting:
        written.popleft().result()
    on_batch(BatchStats(write_wait=time.perf_counter() - started))


def write_outputs(shard: Shard, outputs: ShardOutputs, run_spec_digest: str | None) -> None:
    """Write the files of a shard."""
    # A shard counts as done once its Parquet files exist, so the list of bad images comes first.
    if outputs.bad:
        bad = pl.DataFrame(list(outputs.bad.items()), BAD_IMAGES_SCHEMA, orient="row")
        write_parquet(shard.errors_path, bad)
    for fold, path in shard.paths.items():
        write_shard(
            path, outputs.ids, outputs.features[fold], outputs.logits[fold], run_spec_digest
        )
