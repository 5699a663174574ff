"""Commands in processes of their own that end with all that they have started."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

GRACE = 5.0
"""Seconds that a process has to tidy up after it is asked to end."""


def run(
    command: Sequence[str], seconds: float, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Runs a command for some seconds at most, and ends what it leaves running: compilers, loaders, engines.

    Args:
        options: of `subprocess.Popen`.

    Raises:
        subprocess.TimeoutExpired: it took longer, and has been ended.
    """
    with subprocess.Popen(command, text=True, start_new_session=True, **options) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            end_group(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end_group(process: "subprocess.Popen[str]") -> None:
    """Ends a process that leads a session, and its children and theirs: first asks, then makes them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(GRACE)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM an exception in this block, so that a command that is stopped ends its processes and its files."""
    former = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
