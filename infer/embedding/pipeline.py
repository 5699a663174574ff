"""Decode ahead of the engine: workers fill a ring of batches, one thread takes them in order."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from infer.embedding.decoders import Chunk, Decoders, Decoding
from infer.engines import IN_FLIGHT
from isic.preprocess import Pixels
from isic.runtime.arithmetic import ceil_div

MIN_AHEAD = 2
"""Batches ahead of the engine: one that is ready and one that is being decoded."""


def num_slots(
    batch_size: int, decoders: type[Decoders], num_workers: int, depth: int | None = None
) -> int:
    """Return the number of slots that a ring of batches needs.

    Args:
        batch_size: rows per batch; a view of an image is one.
        decoders: the kind of workers to keep busy.
        num_workers: their number.
        depth: batches ahead of the engine; None for as many as keep the workers busy.
    """
    chunks_per_batch = ceil_div(batch_size, decoders.chunk_size)
    busy = ceil_div(decoders.chunks_ahead * num_workers, chunks_per_batch)
    return (depth or max(MIN_AHEAD, busy)) + IN_FLIGHT


@dataclass(frozen=True)
class Decoded:
    """A decoded batch of N images with V views each."""

    ids: Sequence[str]
    images: Pixels
    """uint8 [V * N, size, size, 3], view by view; zero in failed rows."""
    failed: dict[int, str]
    """The reason by row of the first view."""
    slot: int
    """The slot of the ring, to be released once the images are no longer needed."""
    waited: float
    """Seconds that the reader waited for this batch."""


class DecodeAhead:
    """Batches in order, decoded ahead into the slots that are free; iterate over it once."""

    def __init__(self, decoders: Decoders, slots: Pixels, batches: Iterable[Sequence[str]]) -> None:
        """Prepare the batches; decoding starts with the first one that is taken.

        Args:
            decoders: workers for the same slots.
            slots: uint8 [S, R, size, size, 3].
            batches: the ids of each batch, at most R / V.
        """
        self._decoders = decoders
        self._slots = slots
        self._upcoming = iter(batches)
        self._free = list(range(len(slots)))
        self._ahead: deque[tuple[int, Sequence[str], list[Decoding]]] = deque()

    def __iter__(self) -> Iterator[Decoded]:
        while True:
            self._fill()
            if not self._ahead:
                return
            slot, ids, decodings = self._ahead[0]
            started = time.perf_counter()
            failed: dict[int, str] = {}
            for decoding in decodings:
                failed.update(decoding.result())
            waited = time.perf_counter() - started
            self._ahead.popleft()
            rows = self._decoders.num_views * len(ids)
            yield Decoded(ids, self._slots[slot, :rows], failed, slot, waited)

    def release(self, batch: Decoded) -> None:
        """Let the slot of a batch be overwritten."""
        self._free.append(batch.slot)

    def close(self) -> None:
        """Cancel waiting work and wait for work in progress, which writes into the slots."""
        self._decoders.cancel([decoding for *_, decodings in self._ahead for decoding in decodings])
        self._ahead.clear()

    def _fill(self) -> None:
        """Start to decode a batch into each free slot."""
        while self._free:
            ids = next(self._upcoming, None)
            if ids is None:
                return
            slot = self._free.pop()
            self._ahead.append((slot, ids, self._submit(slot, ids)))

    def _submit(self, slot: int, ids: Sequence[str]) -> list[Decoding]:
        # If possible one chunk per worker, also of a small batch.
        decoders = self._decoders
        smallest = ceil_div(decoders.smallest_chunk, decoders.num_views)
        share = ceil_div(len(ids), decoders.num_workers)
        size = min(decoders.chunk_size, max(smallest, share))
        return [
            decoders.submit(Chunk(slot, len(ids), start, ids[start : start + size]))
            for start in range(0, len(ids), size)
        ]
