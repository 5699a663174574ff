"""A command ends with all its children: the tests wait until none of them holds its pipe."""

import signal
import subprocess
import sys

import pytest

from benchmarks.process import end_group, run_group

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
