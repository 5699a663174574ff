"""Embed shards in one process: decoding runs ahead of the engine, writing behind it."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from infer.embedding.decoders import Recipe, decoders_for
from infer.embedding.models import Models
from infer.embedding.pipeline import DecodeAhead, Decoded, num_slots
from infer.embedding.ring import Ring
from infer.embedding.settings import DecodeIn
from infer.embedding.shards import Shard
from infer.embedding.source import Source
from infer.embedding.store import EmbeddedSplit
from infer.embedding.writer import Computed, ShardWriter
from infer.engines import IN_FLIGHT, Engine, Pending, create_many
from infer.engines.pinned import page_locked
from isic.images import ImageStore
from isic.runtime.errors import UserError
from isic.runtime.machine import num_cores


@dataclass(frozen=True)
class EmbedJob:
    """Everything that a process needs to embed any shard of a run; paths are absolute."""

    data: Path
    split: EmbeddedSplit
    models: Models
    device: str
    dtype: str
    tta: str
    batch_size: int
    num_threads: int | None
    """Decoding threads or processes; None for one per core that this process may use."""
    depth: int | None
    """Batches decoded ahead of the engine; None for as many as keep the decoders busy."""
    decode_in: DecodeIn = "auto"
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
class Submitted:
    """A batch that the engine works on."""

    shard: Shard
    batch: Decoded
    pending: Pending


class Embedder:
    """Embeds shards of one job. A context manager, because it owns threads and processes."""

    def __init__(self, job: EmbedJob, engine: Engine, store: ImageStore) -> None:
        """Start the decoders.

        Args:
            job: the models and the settings.
            engine: the models, loaded; closed with this object.
            store: the images.
        """
        self._job = job
        self._engine = engine
        recipe = Recipe(job.models.spec, job.tta)
        self.images_per_batch = max(1, job.batch_size // recipe.num_views)
        num_workers = job.num_threads or num_cores()
        decoders = decoders_for(job.decode_in, engine.device, num_workers)
        num_rows = self.images_per_batch * recipe.num_views
        slots = num_slots(num_rows, decoders, num_workers, job.depth)
        size = recipe.spec.size
        ring = Ring((slots, num_rows, size, size, 3))
        self._slots = page_locked(ring.slots, engine.device)
        self._decoders = decoders(store, recipe, ring, num_workers)

    @classmethod
    def open(cls, job: EmbedJob) -> "Embedder":
        """Load the models and open the images of a job. Raise UserError if either fails."""
        store = Source(job.data, job.split).open()
        engine = create_many(job.models.artifacts, job.models.manifests, job.device)
        return cls(job, engine, store)

    def __enter__(self) -> "Embedder":
        return self

    def __exit__(self, *_: object) -> None:
        self._decoders.close()
        self._engine.close()

    def decode(self, batches: Iterable[Sequence[str]]) -> DecodeAhead:
        """Return the batches with these ids, at most `images_per_batch` each, decoded ahead."""
        return DecodeAhead(self._decoders, self._slots, batches)

    def run(self, shards: Sequence[Shard], on_batch: OnBatch) -> None:
        """Embed shards and write each as soon as it is complete.

        An exception from `on_batch` ends the run without a partial shard.

        Raises:
            UserError: the disk is full, or an engine fails or returns values that are not finite.
        """
        plan = [
            (shard, rows) for shard in shards for rows in _cut(len(shard), self.images_per_batch)
        ]
        # A generator: the ids of all shards at once would be a large list of Python strings.
        stream = self.decode(shard.ids[rows].to_list() for shard, rows in plan)
        in_flight: deque[Submitted] = deque()
        # Closed after an exception too, because neither the engine nor a decoder may use a slot
        # that the next run fills.
        with (
            contextlib.closing(stream),
            finished(in_flight),
            ShardWriter(
                self._job.dtype, self._job.run_spec_digest, tuple(self._job.models.aux)
            ) as writer,
        ):
            for (shard, _), batch in zip(plan, stream, strict=True):
                started = time.perf_counter()
                pending = self._engine.submit(batch.images, shard.paths)
                in_flight.append(Submitted(shard, batch, pending))
                if len(in_flight) == IN_FLIGHT:
                    collect(in_flight, stream, writer)
                seconds = time.perf_counter() - started
                bad = [(batch.ids[row], reason) for row, reason in batch.failed.items()]
                on_batch(BatchStats(len(batch.ids), bad, batch.waited, seconds))
            while in_flight:
                collect(in_flight, stream, writer)
            writer.finish()
            on_batch(BatchStats(write_wait=writer.waited))


def _cut(num_images: int, batch_size: int) -> Iterable[slice]:
    """Return the rows of each batch of a shard."""
    return (slice(start, start + batch_size) for start in range(0, num_images, batch_size))


def collect(in_flight: deque[Submitted], stream: DecodeAhead, writer: ShardWriter) -> None:
    """Wait for the oldest batch, free its slot and hand its outputs to the writer."""
    oldest = in_flight.popleft()
    outputs = oldest.pending.result()
    stream.release(oldest.batch)
    writer.add(oldest.shard, Computed(oldest.batch.ids, oldest.batch.failed, outputs))


class InFlight(Protocol):
    """Anything with a batch that an engine works on."""

    @property
    def pending(self) -> Pending: ...


@contextlib.contextmanager
def finished(in_flight: Iterable[InFlight]) -> Iterator[None]:
    """Wait at the end of the block for the batches that an exception left in the engine."""
    try:
        yield
    finally:
        for submitted in in_flight:
            with contextlib.suppress(UserError):  # the first error is already on its way
                submitted.pending.result()
