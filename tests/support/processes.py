"""Training as a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.commands import ROOT, TINY
from tests.support.proc import children, is_running

LONG_EPOCHS = "--batch_size 8 --positive_repeats 60 --fold 0 --epochs 2 --ema_decay 0.9"
"""Flags for about 120 steps per epoch, so that a signal arrives within one."""


def command(*arguments: object, num_processes: int = 1) -> list[str]:
    """Return the command that trains the tiny model, by torchrun if in several processes."""
    launcher = []
    if num_processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        launcher.append(str(num_processes))
    return [sys.executable, *launcher, "-m", "train", *map(str, (*TINY, *arguments))]


@contextmanager
def started(*arguments: object, num_processes: int = 1) -> Iterator[subprocess.Popen[str]]:
    """Run training in its own process group; kills it at the end of the block."""
    with running(command(*arguments, num_processes=num_processes)) as process:
        yield process


@contextmanager
def running(command: list[str], **env: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command in its own process group; kills it at the end of the block."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process; its descendants must then end without help."""
    descendants = [process.pid]
    for pid in descendants:
        descendants += children(pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while left := [pid for pid in descendants if is_running(pid)]:
        assert time.monotonic() < deadline, f"{len(left)} processes outlive the killed one"
        time.sleep(0.01)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a process has written a file."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, f"no {path}"
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.005)


def history(fold_dir: Path) -> list[dict[str, float]]:
    """Return the loss and the scores of a fold's epochs."""
    entries = [json.loads(line) for line in (fold_dir / "history.jsonl").read_text().splitlines()]
    return [{key: entry[key] for key in ("epoch", "loss", "pauc", "auc")} for entry in entries]
