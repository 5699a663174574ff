"""Decoders: threads and processes write the same bytes, also if a process is killed."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from infer.embedding import decoders
from infer.embedding.decoders import Chunk, DecoderProcesses, Decoders, DecoderThreads, Recipe
from infer.embedding.ring import Ring
from isic.images import Hdf5Images
from isic.preprocess import PreprocessSpec
from isic.runtime.errors import UserError
from isic.views import VIEWS
from tests.support.commands import ROOT
from tests.support.datasets import jpeg, write_hdf5
from tests.support.proc import is_running

IDS = [f"ISIC_{row:03d}" for row in range(20)]
SIZE = 16
SPEC = PreprocessSpec(size=SIZE)


@pytest.fixture
def store(tmp_path: Path) -> Hdf5Images:
    path = tmp_path / "train-image.hdf5"
    images = {name: jpeg(SIZE, row) for row, name in enumerate(IDS)}
    write_hdf5(path, {**images, "ISIC_007": images["ISIC_007"][:-20]})
    return Hdf5Images(path)


Start = Callable[..., tuple[Decoders, Ring]]


@pytest.fixture
def start(store: Hdf5Images) -> Iterator[Start]:
    """Start decoders for a ring of four slots."""
    with ExitStack() as stack:

        def start(
            kind: type[Decoders], num_workers: int = 2, tta: str = "none"
        ) -> tuple[Decoders, Ring]:
            ring = Ring((4, 20 * len(VIEWS[tta]), SIZE, SIZE, 3))
            started = kind(store, Recipe(SPEC, tta), ring, num_workers)
            stack.callback(started.close)
            return started, ring

        yield start


def chunks(size: int = 5, slot: int = 0) -> list[Chunk]:
    ids = [*IDS[:19], "unknown"]
    return [Chunk(slot, 20, start, ids[start : start + size]) for start in range(0, 20, size)]


@pytest.mark.parametrize("tta", ["none", "d4"])
def test_threads_and_processes_write_the_same(start: Start, tta: str) -> None:
    written = []
    for kind in (DecoderThreads, DecoderProcesses):
        decoders, ring = start(kind, tta=tta)
        ring.slots[:] = 99
        failed = {}
        for decoding in [decoders.submit(chunk) for chunk in chunks()]:
            failed |= decoding.result()
        assert failed == {7: "truncated JPEG", 19: "no image for this id"}
        views = ring.slots[0].reshape(-1, 20, SIZE, SIZE, 3)
        assert not views[:, [7, 19]].any()
        assert (views[:, 3] == 3).all()
        assert (ring.slots[1:] == 99).all(), "no other slot is written"
        written.append(ring.slots[0].copy())
    np.testing.assert_array_equal(*written)


def pids(decoders: Decoders) -> list[int]:
    assert isinstance(decoders, DecoderProcesses)
    return [process._process.pid or 0 for process in decoders._processes]


@pytest.mark.parametrize("when", ["idle", "busy"])
def test_the_work_of_a_killed_process_is_repeated(
    start: Start, when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    decoders, ring = start(DecoderProcesses)
    first = [decoders.submit(chunk) for chunk in chunks(2)]
    if when == "idle":
        for decoding in first:
            decoding.result()
    os.kill(pids(decoders)[0], signal.SIGKILL)
    later = [decoders.submit(chunk) for chunk in chunks(2, slot=1)]
    for decoding in (*first, *later):
        decoding.result()
    np.testing.assert_array_equal(ring.slots[0], ring.slots[1])
    assert (ring.slots[0, 3] == 3).all()
    assert capsys.readouterr().err == (
        "a decoder process was lost (exit code -9); its images are decoded again\n"
    )


class Deadly(Hdf5Images):
    """An image of it kills every process that reads it."""

    def read_at(self, position: int) -> bytes:
        if position == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read_at(position)

    def read_ahead(self, positions: object) -> dict[int, bytes]:
        return {}


def test_images_that_kill_their_decoders_are_named(store: Hdf5Images) -> None:
    ring = Ring((1, 20, SIZE, SIZE, 3))
    started = DecoderProcesses(Deadly(store.source), Recipe(SPEC, "none"), ring, 2)
    decodings = [started.submit(chunk) for chunk in chunks()]
    assert decodings[0].result() == {}
    with pytest.raises(UserError, match=r"2 decoder .* \(exit code -9\) .* ISIC_010 to ISIC_014; "):
        decodings[2].result()
    started.close()


def test_a_file_that_is_replaced_ends_the_run(start: Start, store: Hdf5Images) -> None:
    decoders, _ = start(DecoderProcesses)
    decoders.submit(chunks()[0]).result()
    os.utime(store.source, (0, 0))
    with pytest.raises(UserError, match="changed on disk"):
        decoders.submit(chunks()[1]).result()


def test_cancelled_work_writes_nothing_more(start: Start) -> None:
    for kind in (DecoderThreads, DecoderProcesses):
        decoders, ring = start(kind, 1)
        decodings = [decoders.submit(chunk) for chunk in chunks(1)]
        decoders.cancel(decodings)
        before = ring.slots.copy()
        time.sleep(0.05)
        np.testing.assert_array_equal(ring.slots, before)
        failed = decoders.submit(chunks()[1]).result()
        assert failed == {7: "truncated JPEG"}


def test_processes_end_with_their_owner(start: Start, store: Hdf5Images) -> None:
    ring = Ring((1, 20, SIZE, SIZE, 3))
    started = DecoderProcesses(store, Recipe(SPEC, "none"), ring, 2)
    found = pids(started)
    started.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)


OWNER = """
import sys, time
from pathlib import Path
from infer.embedding.decoders import Chunk, DecoderProcesses, Recipe
from infer.embedding.ring import Ring
from isic.images import Hdf5Images
from isic.preprocess import PreprocessSpec

if __name__ == "__main__":
    ring = Ring((1, 20, 16, 16, 3))
    store = Hdf5Images(Path(sys.argv[1]))
    decoders = DecoderProcesses(store, Recipe(PreprocessSpec(size=16), "none"), ring, 2)
    for _ in range(2):
        decoders.submit(Chunk(0, 20, 0, ["ISIC_000"])).result()
    print(*(process._process.pid for process in decoders._processes), flush=True)
    time.sleep(60)
"""


def test_processes_and_memory_end_with_a_killed_owner(store: Hdf5Images, tmp_path: Path) -> None:
    """No orphans, and nothing is left in memory that has a name."""
    named_before = set(Path("/dev/shm").iterdir())
    (tmp_path / "owner.py").write_text(OWNER)
    owner = subprocess.Popen(
        [sys.executable, tmp_path / "owner.py", store.source],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert owner.stdout is not None
    found = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(found) == 2
    assert all(is_running(pid) for pid in found)
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in found) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_running(pid) for pid in found)
    assert set(Path("/dev/shm").iterdir()) <= named_before


def test_the_memory_of_a_ring_is_freed_with_its_last_array() -> None:
    ring = Ring((1, 1, 8, 8, 3))
    rows = ring.slots[0]
    rows[:] = 7
    del ring
    gc.collect()
    assert (rows == 7).all()


def test_a_gpu_with_several_cores_is_fed_by_processes() -> None:
    assert decoders.decoders_for("auto", "cuda", 16) is DecoderProcesses
    assert decoders.decoders_for("auto", "cuda", 2) is DecoderThreads
    assert decoders.decoders_for("auto", "cpu", 16) is DecoderThreads
    assert decoders.decoders_for("processes", "cpu", 1) is DecoderProcesses
