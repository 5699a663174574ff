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

LONG_EPOCHS = (
    "--batch_size",
    8,
    "--positive_repeats",
    60,
    "--fold",
    0,
    "--epochs",
    2,
    "--ema_decay",
    0.9,
)
"""Some 120 steps an epoch, so that a signal lands within one."""


def command(*arguments: object, torchrun: int = 0) -> list[str]:
    start = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun)]
        if torchrun
        else []
    )
    return [sys.executable, *start, "-m", "train", *map(str, (*TINY, *arguments))]


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A training process in its own process group, gone at the end."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
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


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"no {path}"
        time.sleep(0.005)


def history(fold_dir: Path) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in (fold_dir / "history.jsonl").read_text().splitlines()]
    return [{key: entry[key] for key in ("epoch", "loss", "pauc", "auc")} for entry in entries]
