"""Decode ahead of the engine: threads fill a ring of preallocated batches, one thread reads it."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from infer.engines import pageable
from isic.images import CHUNK, Decoding, ImageStore, collect_failures
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.arithmetic import ceil_div

MIN_DEPTH = 3
"""One batch in the engine, one ready, one being filled."""
# So that no thread runs dry while the engine is busy.
CHUNKS_PER_THREAD = 4
"""Chunks queued per decoding thread."""

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Decoded:
    """A decoded batch of N images."""

    ids: Sequence[str]
    images: Pixels
    """uint8 [N, size, size, 3], zero in failed rows. Overwritten once the next batch is taken."""
    failed: dict[int, str]
    """The reason by row."""
    waited: float
    """Seconds that the reader waited for this batch."""


def ring_depth(batch_size: int, num_threads: int) -> int:
    """Return the number of batches that keep all decoding threads busy."""
    chunks_per_batch = ceil_div(batch_size, CHUNK)
    return max(MIN_DEPTH, ceil_div(CHUNKS_PER_THREAD * num_threads, chunks_per_batch))


def decode_ahead(
    store: ImageStore,
    batches: Iterable[Sequence[str]],
    spec: PreprocessSpec,
    pool: ThreadPoolExecutor,
    batch_size: int,
    depth: int = MIN_DEPTH,
    allocate: Callable[[Shape], Pixels] = pageable,
) -> Generator[Decoded, None, None]:
    """Yield the batches in order; `pool` decodes later ones into a ring of `depth` buffers.

    Closing the generator cancels waiting work and waits for work in progress.
    """
    free = [allocate((batch_size, spec.size, spec.size, 3)) for _ in range(depth)]
    ring: deque[tuple[Sequence[str], Pixels, list[Decoding]]] = deque()
    upcoming = iter(batches)
    try:
        while True:
            while free:
                ids = next(upcoming, None)
                if ids is None:
                    break
                buffer = free.pop()
                ring.append((ids, buffer, store.submit(ids, spec, buffer[: len(ids)], pool)))
            if not ring:
                return
            ids, buffer, decodings = ring[0]
            started = time.perf_counter()
            failed = collect_failures(decodings)
            # The buffer is still in the ring, not in `free`, while the caller reads it: the
            # generator is suspended here, and only this thread submits work, so nothing can
            # overwrite it. By calling next(), the caller releases the batch.
            yield Decoded(ids, buffer[: len(ids)], failed, time.perf_counter() - started)
            free.append(buffer)
            ring.popleft()
    finally:
        # Also after an exception or an early close. Decoders write into the buffers, which must
        # not be freed under them.
        running = [
            decoding for _, _, decodings in ring for decoding in decodings if not decoding.cancel()
        ]
        wait(running)
