"""The time limit of a run whose engines may hang in native code, which no exception ends."""

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn


@contextlib.contextmanager
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
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # its reader has ended
                stream.flush()
        for child in _children():
            with contextlib.suppress(OSError):  # it has ended
                os.kill(child, signal.SIGKILL)
    finally:
        os._exit(code)


def _children() -> Iterator[int]:
    """Yield the processes that the threads of this one have started, on Linux."""
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            yield from map(int, path.read_text().split())
