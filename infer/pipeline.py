"""Decoding ahead of the engine: a ring of preallocated batches between decoder threads and the one who reads them."""

import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from threading import Event, Thread

import numpy as np

from isic.images import ImageStore
from isic.preprocess import Pixels, PreprocessSpec


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


def decode_ahead(
    store: ImageStore,
    batches: Iterable[Sequence[str]],
    spec: PreprocessSpec,
    pool: ThreadPoolExecutor,
    batch_size: int,
    depth: int = 3,
) -> Generator[Decoded, None, None]:
    """Yields the batches in order, decoded by `pool` while the caller works on the one before.

    Memory is `depth` batches whatever the number of images. An error in decoding is raised here; leaving the loop
    early stops the decoder.
    """
    free: Queue[Pixels] = Queue()
    for _ in range(depth):
        free.put(np.empty((batch_size, spec.size, spec.size, 3), np.uint8))
    ready: Queue[tuple[Sequence[str], Pixels, dict[int, str]] | BaseException | None] = Queue()
    stop = Event()

    def produce() -> None:
        try:
            for ids in batches:
                buffer = free.get()
                if stop.is_set():
                    return
                ready.put((ids, buffer, store.decode(ids, spec, buffer[: len(ids)], pool)))
            ready.put(None)
        except BaseException as error:  # handed to the reader, who raises it
            ready.put(error)

    producer = Thread(target=produce, name="decode-ahead", daemon=True)
    producer.start()
    try:
        while True:
            started = time.perf_counter()
            item = ready.get()
            waited = time.perf_counter() - started
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            ids, buffer, failed = item
            yield Decoded(ids, buffer[: len(ids)], failed, waited)
            free.put(buffer)
    finally:
        stop.set()
        free.put(np.empty(0, np.uint8))  # wakes a producer that waits for a buffer
        producer.join()
