"""Engines, images and threads of one process, and the one function that embeds parts, wherever that process runs."""

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

from infer.embedding.pipeline import Decoded, decode_ahead, ring_depth
from infer.embedding.plan import Models, Part
from infer.embedding.store import ERRORS, write_part
from infer.embedding.views import averaged
from infer.engines import Outputs, allocator, load_many
from isic.dataset import Dataset, Split
from isic.images import decode_pool
from isic.runtime.arithmetic import ceil_div
from isic.runtime.errors import UserError
from isic.runtime.files import write_parquet
from isic.runtime.machine import num_cores

MAX_PARTS_WAITING = 2
"""Parts that may wait for the disk before the engines do."""
DTYPES: dict[str, type[np.floating]] = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class Job:
    """What a process needs to know to embed any part of a run. Paths are absolute: it may run elsewhere."""

    data: Path
    split: Split
    models: Models
    device: str
    dtype: str
    tta: str
    batch_size: int
    num_threads: int | None
    """Decoding threads of one process; None: one a core that it may use."""
    depth: int | None
    """Batches in the ring; None: what keeps the threads busy."""
    plan_digest: str | None = None
    """Of the run's plan; each part says that it was made by it."""


@dataclass(frozen=True)
class Step:
    """What one batch (or one part) was and cost; seconds are the control thread's."""

    num_images: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Id and reason of each image that cannot be used."""
    decode_wait: float = 0.0
    engine: float = 0.0
    write_wait: float = 0.0


Report = Callable[[Step], None]


@dataclass(frozen=True)
class PartOutputs:
    """What the engines said of a part's N good images, and why the others are not good."""

    ids: list[str]
    features: dict[int, NDArray[np.floating]]
    """[N, D] by fold, in the type that is stored."""
    logits: dict[int, NDArray[np.float32]]
    """[N] by fold."""
    bad: dict[str, str]


class Embedder:
    """Embeds parts of one job. Use it as a context: it owns threads."""

    def __init__(self, job: Job) -> None:
        """Loads the engines and opens the images. Raises UserError where either does not work here."""
        self._job = job
        self._engines = load_many(job.models.artifacts, job.models.manifests, job.device)
        self._store = Dataset(job.data).images(job.split)
        self._num_threads = job.num_threads or num_cores()
        self._pool = decode_pool(self._num_threads)
        self._dtype = DTYPES[job.dtype]

    def __enter__(self) -> "Embedder":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(self, parts: Sequence[Part], report: Report) -> None:
        """Embeds parts: decoding runs ahead, writing runs behind, the engines in between set the pace.

        `report` hears of each batch; what it raises ends the run, like Ctrl-C, with whole parts on disk and no thread
        left behind.

        Raises:
            UserError: the disk is full, or an engine gives what cannot be stored.
        """
        written: deque[Future[None]] = deque()
        stream = self._decoded(parts)
        with (
            contextlib.closing(stream),
            ThreadPoolExecutor(1, thread_name_prefix="write") as writer,
        ):
            for part in parts:
                written.append(
                    writer.submit(
                        write, part, self._embed(part, stream, report), self._job.plan_digest
                    )
                )
                _await_all_but(MAX_PARTS_WAITING, written, report)
            _await_all_but(0, written, report)

    def _decoded(self, parts: Sequence[Part]) -> Generator[Decoded, None, None]:
        size = self._job.batch_size
        batches = (
            part.ids.slice(at, size).to_list() for part in parts for at in range(0, len(part), size)
        )
        allocate = allocator(next(iter(self._engines.values())))
        depth = self._job.depth or ring_depth(size, self._num_threads)
        return decode_ahead(
            self._store, batches, self._job.models.spec, self._pool, size, depth, allocate
        )

    def _embed(self, part: Part, stream: Iterator[Decoded], report: Report) -> PartOutputs:
        """Takes a part's batches off the stream and runs every engine of the part on each."""
        engines = {fold: self._engines[fold] for fold in part.paths}
        shape = (len(part), self._job.models.num_features)
        outputs = PartOutputs(
            ids=[],
            features={fold: np.empty(shape, self._dtype) for fold in engines},
            logits={fold: np.empty(len(part), np.float32) for fold in engines},
            bad={},
        )
        for batch in islice(stream, ceil_div(len(part), self._job.batch_size)):
            started = time.perf_counter()
            _store(outputs, batch, averaged(engines, batch.images, self._job.tta))
            bad = [(batch.ids[row], reason) for row, reason in batch.failed.items()]
            outputs.bad.update(bad)
            engine = time.perf_counter() - started
            report(Step(len(batch.ids), bad, decode_wait=batch.waited, engine=engine))
        return _trimmed(outputs)


def _store(outputs: PartOutputs, batch: Decoded, results: Mapping[int, Outputs]) -> None:
    """Appends a batch's good rows to a part's outputs."""
    good = [row for row in range(len(batch.ids)) if row not in batch.failed]
    at = slice(len(outputs.ids), len(outputs.ids) + len(good))
    for fold, (features, logits) in results.items():
        outputs.features[fold][at] = features[good]
        outputs.logits[fold][at] = logits[good, 0]
    outputs.ids.extend(batch.ids[row] for row in good)


def _trimmed(outputs: PartOutputs) -> PartOutputs:
    """Drops the room that bad images left. Raises UserError for a value that is not finite."""
    num_good = len(outputs.ids)
    features = {fold: values[:num_good] for fold, values in outputs.features.items()}
    logits = {fold: values[:num_good] for fold, values in outputs.logits.items()}
    for fold, values in features.items():
        finite = np.isfinite(values).all(axis=1) & np.isfinite(logits[fold])
        if not finite.all():
            raise UserError(
                f"the engine of fold {fold} gives {outputs.ids[int(np.argmin(finite))]} values that are not finite as "
                f"{values.dtype}; use --dtype float32, or export the model in another precision"
            )
    return PartOutputs(outputs.ids, features, logits, outputs.bad)


def _await_all_but(number: int, written: deque[Future[None]], report: Report) -> None:
    """Waits until at most `number` parts are not yet on disk."""
    started = time.perf_counter()
    while len(written) > number:
        written.popleft().result()
    report(Step(write_wait=time.perf_counter() - started))


def write(part: Part, outputs: PartOutputs, plan_digest: str | None) -> None:
    """Writes a part's files, the reasons for its bad images first: a part that exists has said all it knows."""
    if outputs.bad:
        write_parquet(
            part.errors_path, pl.DataFrame(list(outputs.bad.items()), ERRORS, orient="row")
        )
    for fold, path in part.paths.items():
        write_part(path, outputs.ids, outputs.features[fold], outputs.logits[fold], plan_digest)
