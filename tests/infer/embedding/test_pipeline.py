import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from infer.embedding.decoders import (
    Chunk,
    DecoderProcesses,
    Decoders,
    DecoderThreads,
    Decoding,
    Recipe,
)
from infer.embedding.pipeline import DecodeAhead, num_slots
from infer.embedding.ring import Ring
from infer.engines import IN_FLIGHT
from isic.images import Hdf5Images, ImageStore
from isic.preprocess import PreprocessSpec
from tests.support.datasets import jpeg, write_hdf5

RECIPE = Recipe(PreprocessSpec(size=16), "none")
IDS = [f"ISIC_{row:03d}" for row in range(100)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Hdf5Images:
    path = tmp_path_factory.mktemp("images") / "train-image.hdf5"
    write_hdf5(path, {name: jpeg(16, row) for row, name in enumerate(IDS)})
    return Hdf5Images(path)


def batches(size: int) -> list[list[str]]:
    return [IDS[at : at + size] for at in range(0, len(IDS), size)]


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def ahead(
    opened: ExitStack,
    store: ImageStore,
    upcoming: Iterator[Sequence[str]] | list[list[str]],
    num_images: int,
    slots: int,
    num_workers: int,
    kind: type[Decoders] = DecoderThreads,
) -> DecodeAhead:
    """Return a stream of batches of at most `num_images` in a ring of so many slots."""
    ring = Ring((slots, num_images, 16, 16, 3))
    decoders = kind(store, RECIPE, ring, num_workers)
    opened.callback(decoders.close)
    return opened.enter_context(closing(DecodeAhead(decoders, ring.slots, upcoming)))


@pytest.mark.parametrize("kind", [DecoderThreads, DecoderProcesses])
@pytest.mark.parametrize(
    ("size", "slots", "num_workers"), [(1, 2, 3), (7, 3, 1), (33, 3, 2), (200, 2, 2)]
)
def test_batches_arrive_whole_and_in_order(
    store: ImageStore,
    opened: ExitStack,
    size: int,
    slots: int,
    num_workers: int,
    kind: type[Decoders],
) -> None:
    seen: list[str] = []
    stream = ahead(opened, store, batches(size), size, slots, num_workers, kind)
    for batch in stream:
        assert batch.images.shape == (len(batch.ids), 16, 16, 3)
        assert not batch.failed
        expected = range(len(seen), len(seen) + len(batch.ids))
        np.testing.assert_array_equal(batch.images[:, 3, 3, 0], expected)
        seen += batch.ids
        stream.release(batch)
    assert seen == IDS


def test_a_batch_stays_as_it_is_until_it_is_released(store: ImageStore, opened: ExitStack) -> None:
    stream = ahead(opened, store, batches(10), 10, slots=4, num_workers=2)
    held = []
    for batch in stream:
        held.append(batch)
        if len(held) == 3:
            oldest = held.pop(0)
            first = IDS.index(oldest.ids[0])
            np.testing.assert_array_equal(oldest.images[:, 3, 3, 0], range(first, first + 10))
            stream.release(oldest)
    assert [batch.ids[0] for batch in held] == ["ISIC_080", "ISIC_090"]


def test_nothing_is_decoded_further_ahead_than_the_ring(
    store: ImageStore, opened: ExitStack
) -> None:
    taken = []

    def upcoming() -> Iterator[list[str]]:
        for batch in batches(5):
            taken.append(batch)
            yield batch

    stream = ahead(opened, store, upcoming(), 5, slots=4, num_workers=2)
    for number, batch in zip(range(3), stream, strict=False):
        assert len(taken) == number + 4
        stream.release(batch)


class Slow(Hdf5Images):
    """Counts reads; one of them fails in a way that is nobody's fault but the code's."""

    def __init__(self, path: Path, fails_at: int = -1) -> None:
        super().__init__(path)
        self.reads = 0
        self.fails_at = fails_at

    def read_ahead(self, positions: object) -> dict[int, bytes]:
        return {}

    def read_at(self, position: int) -> bytes:
        self.reads += 1
        time.sleep(0.005)
        if position == self.fails_at:
            raise RuntimeError("a bug")
        return super().read_at(position)


def test_an_error_in_a_thread_is_raised_in_its_turn(store: Hdf5Images, opened: ExitStack) -> None:
    seen = 0
    stream = ahead(opened, Slow(store.source, fails_at=57), batches(10), 10, 3, num_workers=2)
    with pytest.raises(RuntimeError, match="a bug"):
        for batch in stream:
            seen += len(batch.ids)
            stream.release(batch)
    assert seen == 50


def test_leaving_early_drops_work_that_is_not_begun(store: Hdf5Images, opened: ExitStack) -> None:
    slow = Slow(store.source)
    stream = ahead(opened, slow, batches(10), 10, slots=8, num_workers=1)
    next(iter(stream))
    stream.close()
    reads = slow.reads
    assert reads <= 30, "eight batches were in the ring"
    time.sleep(0.05)
    assert slow.reads == reads, "nothing goes on"


def test_the_ring_keeps_the_workers_busy() -> None:
    assert num_slots(256, DecoderThreads, 2) == 2 + IN_FLIGHT
    assert num_slots(16, DecoderThreads, 2) == 8 + IN_FLIGHT
    assert num_slots(256, DecoderThreads, 16) == 8 + IN_FLIGHT
    assert num_slots(256, DecoderProcesses, 16) == 8 + IN_FLIGHT
    assert num_slots(256, DecoderThreads, 16, depth=5) == 5 + IN_FLIGHT


@pytest.mark.parametrize(
    ("kind", "num_views", "size", "most"),
    [
        (DecoderProcesses, 1, 256, 16),
        (DecoderProcesses, 8, 32, 2),
        (DecoderProcesses, 1, 4096, 64),
        (DecoderThreads, 1, 256, 4),
    ],
)
def test_a_message_is_worth_its_cost_however_many_workers_there_are(
    kind: type[Decoders], num_views: int, size: int, most: int
) -> None:
    class Recording(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self.num_workers, self.num_views = 64, num_views
            self.chunks: list[int] = []

        def submit(self, chunk: Chunk) -> Decoding:
            self.chunks.append(len(chunk.ids))
            return Future()

    decoders = Recording()
    names = [str(number) for number in range(size)]
    DecodeAhead(decoders, np.empty((1, 0), np.uint8), [names])._fill()
    assert sum(decoders.chunks) == size
    assert max(decoders.chunks) == most
