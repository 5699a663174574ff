"""A command ends with all its children: the tests wait until none of them holds its pipe."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.process import end_group, run_group, run_groups

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('ready', flush=True); time.sleep(600)"
)
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {STUBBORN!r}])"
"""Starts a child that ignores SIGTERM."""
NESTED = f"""
import sys
from benchmarks.process import run_group, terminable
with terminable():
    run_group([sys.executable, "-c", {PARENT!r}], 600)
"""


def started(code: str) -> "subprocess.Popen[str]":
    """Start Python code in a new session and wait for its innermost child."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_group_ends_with_a_child_that_ignores_sigterm() -> None:
    with started(PARENT) as process:
        end_group(process)
        assert process.stdout is not None
        assert process.stdout.read() == ""
    assert process.returncode == -signal.SIGTERM


def test_a_terminated_command_ends_its_own_commands() -> None:
    with started(NESTED) as process:
        process.terminate()
        assert process.stdout is not None
        assert process.stdout.read() == ""
    assert process.returncode == 128 + signal.SIGTERM


def test_a_command_that_takes_too_long_is_ended() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_group([sys.executable, "-c", PARENT], 0.5, stdout=subprocess.PIPE)
    ended = run_group([sys.executable, "-c", "print('done'); exit(3)"], 60, stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout) == (3, "done\n")


def test_commands_run_at_once_and_each_has_a_limit_and_a_file(tmp_path: Path) -> None:
    codes = {"quick": "print('done')", "failed": "exit(3)", "stubborn": STUBBORN}
    commands = {tmp_path / name: [sys.executable, "-c", code] for name, code in codes.items()}
    ended = list(run_groups(commands, num_at_once=2, seconds=2))
    assert {path.name: code for path, code in ended} == {"quick": 0, "failed": 3, "stubborn": None}
    assert ended[-1][0].name == "stubborn", "the others did not wait for it"
    assert (tmp_path / "quick").read_text() == "done\n"


def test_commands_end_with_the_loop_over_them(tmp_path: Path) -> None:
    endless = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    codes = {"quick": "print('done')", "endless": endless}
    commands = {tmp_path / name: [sys.executable, "-c", code] for name, code in codes.items()}
    running = run_groups(commands, num_at_once=2, seconds=600)
    assert next(running) == (tmp_path / "quick", 0)
    while not (text := (tmp_path / "endless").read_text()):
        time.sleep(0.01)
    running.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(int(text), 0)
