"""Commands in processes of their own that end together with every process they started."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""
POLL = 0.05
"""Seconds between two looks at processes that run at once."""
MEMORY_POLL = 0.25
"""Seconds between two looks at the memory of processes."""


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


def run_groups(
    commands: Mapping[Path, Sequence[str]], num_at_once: int, seconds: float
) -> Iterator[tuple[Path, int | None]]:
    """Run commands, some at once, each with its output in a file.

    Args:
        commands: by the file of the output.
        seconds: time limit of each.

    Yields:
        The file and the exit code of each command as it ends; None if it took longer.
    """
    waiting = deque(commands.items())
    running: dict[Path, tuple[subprocess.Popen[str], float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_at_once:
                path, command = waiting.popleft()
                running[path] = (_start_group(command, path), time.monotonic() + seconds)
            time.sleep(POLL)
            for path, (process, deadline) in list(running.items()):
                code = process.poll()
                if code is not None or time.monotonic() > deadline:
                    end_group(process)
                    del running[path]
                    yield path, code
    finally:
        for process, _ in running.values():
            end_group(process)


def watch_memory(process: "subprocess.Popen[Any]") -> float:
    """Wait for a process to end. Return the peak memory of it and its descendants in MB.

    Memory that several of them share counts once (PSS in proc(5)).
    """
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_proportional_kb(pid) for pid in _tree(process.pid)))
        time.sleep(MEMORY_POLL)
    return peak / 1024


def _tree(pid: int) -> Iterator[int]:
    """Yield a process and its descendants, as Linux lists them."""
    yield pid
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended
            for child in listed.read_text(encoding="utf-8").split():
                yield from _tree(int(child))


def _proportional_kb(pid: int) -> int:
    with contextlib.suppress(OSError):  # it has ended
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
        return next((int(line.split()[1]) for line in text.splitlines() if "Pss:" in line), 0)
    return 0


def _start_group(command: Sequence[str], output: Path) -> "subprocess.Popen[str]":
    with open(output, "w", encoding="utf-8") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )


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
