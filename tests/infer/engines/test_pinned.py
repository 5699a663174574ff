"""Page-locked memory, on a fake driver that prints what is locked."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from infer.embedding.ring import Ring
from infer.engines.pinned import page_locked
from tests.support import fake_driver
from tests.support.commands import ROOT

SCRIPT = """
import gc
from threading import Thread
from infer.embedding.ring import Ring
from infer.engines.pinned import page_locked

slots = page_locked(Ring((2, 3, 4, 4, 3)).slots, "cuda")
print(f"slots {slots.ctypes.data:#x} {slots.nbytes}", flush=True)
part = slots[1]
del slots
gc.collect()
part[:] = 7
print("in use", flush=True)
views = [part]
del part
thread = Thread(target=views.clear)  # which has not used CUDA
thread.start()
thread.join()
print("end", flush=True)
"""


def run(environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", SCRIPT]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )


def test_a_ring_is_locked_as_long_as_it_is_in_use(tmp_path: Path) -> None:
    ended = run(fake_driver.install(tmp_path))
    lock, slots, in_use, unlock, end = ended.stdout.splitlines()
    _, address, size = slots.split()
    assert (in_use, end) == ("in use", "end")
    assert lock == f"lock {address} {size}"
    assert unlock == f"unlock {address}"
    assert int(size) == 2 * 3 * 4 * 4 * 3


def test_memory_that_cannot_be_locked_is_used_as_it_is(tmp_path: Path) -> None:
    ended = run(fake_driver.install(tmp_path) | {"FAKE_FULL": "1"})
    assert "lock" not in ended.stdout
    assert ended.stderr == (
        "warning: the input of the GPU cannot be page-locked (out of memory), "
        "so copies to it are slower\n"
    )


def test_memory_for_a_cpu_is_not_locked() -> None:
    slots = Ring((1, 1, 4, 4, 3)).slots
    assert page_locked(slots, "cpu") is slots
    empty = np.empty(0, np.uint8)
    assert page_locked(empty, "cuda") is empty
