"""A process whose engine hangs ends at its time limit."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from infer.submission.deadline import ended_at

ALREADY_ENDED = """
from pathlib import Path
from tempfile import mkdtemp
from infer.submission.deadline import end_process

thread, other = Path(mkdtemp()), Path(mkdtemp()) / "children"
other.write_text("4194305")  # a process beyond the largest number of Linux
Path.glob = lambda *_: iter([thread, other])  # a folder cannot be read
end_process(7)
"""
HANGS = """
import ctypes, subprocess, sys
from infer.submission.deadline import end_process, ended_at

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
with ended_at(1.0, lambda: end_process(7)):
    ctypes.CDLL(None).sleep(60)  # in native code, as an engine
"""


def test_native_code_that_hangs_is_ended_with_its_children() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 7
    state = Path("/proc") / ended.stdout.strip() / "stat"
    deadline = time.monotonic() + 60
    while state.exists() and " Z " not in state.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_threads_and_children_that_have_just_ended_do_not_save_the_process() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ALREADY_ENDED], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (7, "")


@pytest.mark.parametrize("seconds", [float("inf"), 1e12, 30.0])
def test_a_block_that_ends_in_time_is_left_alone(seconds: float) -> None:
    called: list[int] = []
    with ended_at(seconds, lambda: called.append(1)):
        pass
    assert not called
