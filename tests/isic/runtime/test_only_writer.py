"""One process at a time writes an output, whatever becomes of it."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from isic.runtime.errors import UserError
from isic.runtime.only_writer import only_writer
from tests.support.commands import ROOT

HOLDER = """
import os, sys, time
from pathlib import Path
from isic.runtime.only_writer import only_writer
with only_writer(Path(sys.argv[1])):
    if os.fork() == 0:
        time.sleep(60)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def hold(path: Path) -> "subprocess.Popen[bytes]":
    """Start a process, with a child, that holds a path; both are in a process group of their own."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_another_process_is_named_until_it_dies(tmp_path: Path) -> None:
    """Even if a child outlives it."""
    path = tmp_path / "out"
    process = hold(path)
    try:
        for same in (path, tmp_path / "x" / ".." / "out"):
            with (
                pytest.raises(UserError, match=f"^process {process.pid} is writing "),
                only_writer(same),
            ):
                pytest.fail("two writers")
        with only_writer(tmp_path / "other"):
            pass
        process.kill()
        process.wait()
        with only_writer(path):
            pass
        assert not path.exists()
        assert not list(tmp_path.glob("*.lock")), "a lock has been left"
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_without_a_place_for_locks_commands_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with only_writer(tmp_path / "out"):
        pass


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    with only_writer(tmp_path / "out"):
        (lock,) = tmp_path.glob("*.lock")
    for target in (tmp_path / "thesis", tmp_path / "missing"):
        (tmp_path / "thesis").write_text("mine")
        lock.symlink_to(target)
        with (
            pytest.raises(UserError, match=r"\.lock is a symbolic link, .*; remove it, or"),
            only_writer(tmp_path / "out"),
        ):
            pytest.fail("followed")
        assert (tmp_path / "thesis").read_text() == "mine"
        assert not (tmp_path / "missing").exists()
        lock.unlink()


def test_a_second_block_of_the_same_process_does_not_release_the_first(tmp_path: Path) -> None:
    with only_writer(tmp_path / "out"):
        with pytest.raises(AssertionError, match="holds"), only_writer(tmp_path / "x/../out"):
            pytest.fail("two writers")
        assert list(tmp_path.glob("*.lock"))
    with only_writer(tmp_path / "out"):
        pass
