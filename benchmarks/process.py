"""Commands in processes of their own that end together with every process they started."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""


def run_group(
    command: Sequence[str], seconds: float, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a command and end processes that it leaves running: compilers, loaders, engines.

    Args:
        options: of `subprocess.Popen`.

    Raises:
        subprocess.TimeoutExpired: it took longer and was ended.
    """
    with subprocess.Popen(command, text=True, start_new_session=True, **options) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            end_group(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end_group(process: "subprocess.Popen[str]") -> None:
    """End a session leader and its descendants: SIGTERM, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(GRACE)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM into SystemExit within the block, so that `finally` blocks run."""
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
