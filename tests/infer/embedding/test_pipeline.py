import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from infer.embedding.pipeline import decode_ahead, ring_depth
from isic.images import Hdf5Images, ImageStore, decode_pool
from isic.preprocess import Pixels, PreprocessSpec
from tests.support.datasets import jpeg, write_hdf5

SPEC = PreprocessSpec(size=16)


IDS = [f"ISIC_{row:03d}" for row in range(100)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Hdf5Images:
    path = tmp_path_factory.mktemp("images") / "train-image.hdf5"
    write_hdf5(path, {name: jpeg(16, row) for row, name in enumerate(IDS)})
    return Hdf5Images(path)


def batches(size: int) -> list[list[str]]:
    return [IDS[at : at + size] for at in range(0, len(IDS), size)]


@pytest.mark.parametrize(
    ("size", "depth", "num_threads"), [(1, 2, 3), (7, 3, 1), (33, 3, 2), (200, 2, 2)]
)
def test_batches_arrive_whole_and_in_order(
    store: ImageStore, size: int, depth: int, num_threads: int
) -> None:
    seen: list[str] = []
    with decode_pool(num_threads) as pool:
        for batch in decode_ahead(store, batches(size), SPEC, pool, size, depth):
            assert batch.images.shape == (len(batch.ids), 16, 16, 3)
            assert not batch.failed
            expected = range(len(seen), len(seen) + len(batch.ids))
            np.testing.assert_array_equal(batch.images[:, 3, 3, 0], expected)
            seen += batch.ids
    assert seen == IDS


def test_memory_is_the_ring_and_nothing_is_decoded_further_ahead(store: ImageStore) -> None:
    taken, allocated = [], []

    def allocate(shape: tuple[int, int, int, int]) -> Pixels:
        allocated.append(shape)
        return np.empty(shape, np.uint8)

    def upcoming() -> Iterator[list[str]]:
        for batch in batches(5):
            taken.append(batch)
            yield batch

    with decode_pool(2) as pool:
        stream = decode_ahead(store, upcoming(), SPEC, pool, 5, 4, allocate)
        for number, _ in zip(range(3), stream, strict=False):
            assert len(taken) == number + 4
        stream.close()
    assert allocated == [(5, 16, 16, 3)] * 4


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


def test_an_error_in_a_thread_is_raised_in_its_turn(store: Hdf5Images) -> None:
    seen = 0
    with decode_pool(2) as pool, pytest.raises(RuntimeError, match="a bug"):
        for batch in decode_ahead(Slow(store.source, fails_at=57), batches(10), SPEC, pool, 10):
            seen += len(batch.ids)
    assert seen == 50


def test_leaving_early_drops_work_that_is_not_begun(store: Hdf5Images) -> None:
    slow = Slow(store.source)
    with decode_pool(1) as pool:
        stream = decode_ahead(slow, batches(10), SPEC, pool, 10, depth=8)
        next(stream)
        stream.close()
        reads = slow.reads
        assert reads <= 30, "eight batches were in the ring"
        time.sleep(0.05)
        assert slow.reads == reads, "nothing goes on"


def test_the_ring_keeps_the_threads_busy() -> None:
    assert ring_depth(256, 2) == 3
    assert ring_depth(16, 2) == 8
    assert ring_depth(256, 16) == 8
