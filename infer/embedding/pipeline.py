"""Decoding ahead of the engine: a ring of preallocated batches that decoder threads fill and one thread reads."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from infer.engines import pageable
from isic.images import CHUNK, Decoding, ImageStore, gather
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.arithmetic import ceil_div

MIN_DEPTH = 3
"""One batch in the engine, one ready, one being filled."""
CHUNKS_A_THREAD = 4
"""Work that should wait for each thread, so that none runs dry while the engine is busy."""

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Decoded:
    """A decoded batch. `images` is valid until the next one is asked for: its memory is then used again."""

    ids: Sequence[str]
    images: Pixels
    """uint8 [N, size, size, 3]; rows that failed are zero."""
    failed: dict[int, str]
    """The reason by row."""
    waited: float
    """Seconds its reader had to wait for it."""


def ring_depth(batch_size: int, num_threads: int) -> int:
    """Returns how many batches keep `num_threads` decoders busy."""
    chunks_a_batch = ceil_div(batch_size, CHUNK)
    return max(MIN_DEPTH, ceil_div(CHUNKS_A_THREAD * num_threads, chunks_a_batch))


def decode_ahead(
    store: ImageStore,
    batches: Iterable[Sequence[str]],
    spec: PreprocessSpec,
    pool: ThreadPoolExecutor,
    batch_size: int,
    depth: int = MIN_DEPTH,
    allocate: Callable[[Shape], Pixels] = pageable,
) -> Generator[Decoded, None, None]:
    """Yields the batches in order, decoded by `pool` while the caller works on those before.

    There is no thread beside the pool's: each time the caller comes back, the batch it has done with joins the end of
    the ring. Memory is `depth` batches whatever the number of images. An error in decoding is raised here; leaving
    the loop early, for whatever reason, drops what is not begun and waits for what is.
    """
    free = [allocate((batch_size, spec.size, spec.size, 3)) for _ in range(depth)]
    ring: deque[tuple[Sequence[str], Pixels, list[Decoding]]] = deque()
    upcoming = iter(batches)
    try:
        while True:
            while free and (ids := next(upcoming, None)) is not None:
                buffer = free.pop()
                ring.append((ids, buffer, store.submit(ids, spec, buffer[: len(ids)], pool)))
            if not ring:
                return
            ids, buffer, decodings = ring[0]
            started = time.perf_counter()
            failed = gather(decodings)
            yield Decoded(ids, buffer[: len(ids)], failed, time.perf_counter() - started)
            free.append(buffer)
            ring.popleft()
    finally:
        unfinished = [decoding for _, _, decodings in ring for decoding in decodings]
        wait([decoding for decoding in unfinished if not decoding.cancel()])
