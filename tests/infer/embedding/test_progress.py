import os
import subprocess
from pathlib import Path

import polars as pl
import pytest

from infer.embedding.embedder import BatchStats
from infer.embedding.progress import Progress
from infer.embedding.shards import Shard
from isic.runtime.errors import UserError
from tests.support.commands import ROOT
from tests.support.fake_run import FakeRun, finished_shard


def test_bad_images_are_counted_against_the_whole_run(tmp_path: Path) -> None:
    done = finished_shard(tmp_path, 0, num_bad=1)
    due = [finished_shard(tmp_path, number) for number in (1, 2, 3)]
    for shard in due:
        shard.paths[0].unlink()
    progress = Progress([done, *due], "skip", 0.05, quiet=True)
    assert (progress.num_images, progress.num_due) == (10, 30)
    progress.add(BatchStats(10, [("1-0", "zero bytes")], decode_wait=1.0, engine=3.0))
    assert progress.bound_by == "engine"
    assert progress.time_shares == {"decode": 0.25, "engine": 0.75, "write": 0.0}
    message = r"3 of the first 30 images cannot be used \(2 zero bytes, 1 truncated JPEG\)"
    with pytest.raises(UserError, match=message):
        progress.add(BatchStats(10, [("2-0", "zero bytes")]))
    with pytest.raises(UserError, match="0-0: truncated JPEG; fix it"):
        Progress([done, *due], "raise", 1.0, quiet=True)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_shows_a_bar_unless_quiet(
    fake_run: FakeRun, tmp_path: Path, quiet: bool
) -> None:
    pty = pytest.importorskip("pty")
    termios = pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    command = fake_run.command(tmp_path, *(["--quiet"] if quiet else []))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs)
    assert process.wait(60) == 0
    os.set_blocking(ours, False)
    os.close(theirs)
    try:
        shown = os.read(ours, 1 << 20).decode()
    except OSError:  # nothing was written, and the other end is closed
        shown = ""
    os.close(ours)
    assert ("img/s" in shown and "bound by" in shown) is not quiet


def test_the_time_left_is_that_of_the_speed_without_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks take a minute to load, which says nothing about the time of an image."""
    now = 0.0
    monkeypatch.setattr("infer.embedding.progress.time.perf_counter", lambda: now)
    shard = Shard(pl.Series(map(str, range(400)), dtype=pl.String), {0: tmp_path / "part-0"})
    progress = Progress([shard], "skip", 1.0, quiet=True)
    assert (progress.seconds_left, progress.timed_seconds) == (float("inf"), 0.0)
    now = 60.0
    progress.add(BatchStats(100))
    assert progress.seconds_left == float("inf")
    now = 64.0
    progress.add(BatchStats(100))
    assert (progress.seconds_left, progress.timed_seconds) == (8.0, 4.0)
    progress.add(BatchStats(200))
    assert progress.seconds_left == 0.0
