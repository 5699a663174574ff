"""The time limit of a run whose engines may hang in native code, which no exception ends."""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


@contextmanager
def ended_at(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` in a thread of its own if the block is not done after some seconds."""
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), action)
    timer.daemon = True
    if math.isfinite(seconds):
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end_process(code: int) -> NoReturn:
    """End this process and its children at once, whatever its other threads do."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in _children():
        os.kill(child, signal.SIGKILL)
    os._exit(code)


def _children() -> list[int]:
    """Return the processes that the threads of this one have started, on Linux."""
    lists = Path("/proc/self/task").glob("*/children")
    return [int(pid) for path in lists for pid in path.read_text().split()]
