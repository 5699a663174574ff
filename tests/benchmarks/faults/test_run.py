"""Attempts are dealt evenly, logged, resumed and counted, whatever becomes of the worker."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from benchmarks.faults.attempts import deal, interleave
from benchmarks.faults.run import LOG_FILE
from benchmarks.settings import CAMPAIGNS
from tests.support.commands import ROOT, Cli, Finished
from tests.support.proc import children, is_running
from tests.support.stub_campaign import SECOND_SOURCE, SOURCE

STUB_COMMAND = f"""
import sys
from benchmarks.__main__ import COMMANDS
from benchmarks.settings import CAMPAIGNS
from isic.runtime.cli import run
CAMPAIGNS["stub"] = ({SOURCE!r}, 4)
if __name__ == "__main__":
    run(COMMANDS)
"""


RunStub = Callable[..., Finished]


@pytest.fixture
def run_stub(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStub:
    monkeypatch.setitem(CAMPAIGNS, "stub", (SOURCE, 4))

    def run(*flags: object) -> Finished:
        folders = ("--work_dir", tmp_path / "work", "--results", tmp_path)
        return cli("benchmarks", "faults", "--campaign", "stub", *folders, *flags)

    return run


def logged(tmp_path: Path) -> list[tuple[str, int]]:
    lines = (tmp_path / "work" / LOG_FILE).read_text().splitlines()
    return [(line["target"], line["seed"]) for line in map(json.loads, lines)]


def test_targets_take_turns_and_campaigns_end_together() -> None:
    assert list(deal("ab", 5)) == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)]
    mixed = [
        task[0] for task in interleave({"many": list(deal("a", 6)), "few": list(deal("b", 2))})
    ]
    assert mixed.count("few") == 2
    assert mixed.index("few") in (1, 2)
    assert mixed[::-1].index("few") in (1, 2)


def test_outcomes_are_counted_and_a_finished_run_is_not_repeated(
    run_stub: RunStub, tmp_path: Path
) -> None:
    targets = ("--target", "first,second", "--num_workers", 2)
    ended = run_stub(*targets)
    assert ended.code == 0, ended.err
    assert sorted(logged(tmp_path)) == [("first", 0), ("first", 1), ("second", 0), ("second", 1)]
    assert not list((tmp_path / "work" / "scratch").iterdir())
    ended = run_stub(*targets, "--attempts", 7)
    assert ended.code == 1
    assert "4 attempts are in" in ended.out
    command = "--campaign stub --target first --seed 2"
    assert command in ended.out
    assert len(logged(tmp_path)) == 7
    *_, whole, first, second = pl.read_csv(tmp_path / "faults.csv").iter_rows(named=True)
    assert [whole[name] for name in ("target", "attempts", "failed")] == ["all", 7, 2]
    assert [first[name] for name in ("attempts", "survived", "refused", "failed")] == [4, 2, 1, 1]
    assert [second[name] for name in ("attempts", "survived", "refused", "failed")] == [3, 1, 1, 1]


def test_a_worker_serves_one_campaign(
    run_stub: RunStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of another campaign would hang a forked child, or not see a new mount."""
    monkeypatch.setitem(CAMPAIGNS, "second_stub", (SECOND_SOURCE, 4))
    both = ("--campaign", "stub,second_stub", "--target", "first", "--attempts", 2)
    ended = run_stub(*both, "--num_workers", 1)
    assert ended.code == 0, ended.out
    assert len(logged(tmp_path)) == 4


def test_an_attempt_is_repeated_alone_and_not_recorded(run_stub: RunStub, tmp_path: Path) -> None:
    ended = run_stub("--target", "second", "--seed", "2")
    assert ended.code == 1
    assert "second 2: failed: as planned" in ended.out
    assert not (tmp_path / "work" / LOG_FILE).exists()


@pytest.mark.parametrize(
    ("target", "reason"),
    [("killer", "the worker died with exit code 9"), ("raiser", "LookupError: no such thing")],
)
def test_a_lost_worker_and_an_exception_count_as_failed(
    target: str, reason: str, run_stub: RunStub, tmp_path: Path
) -> None:
    ended = run_stub("--target", f"first,{target}", "--attempts", 3, "--num_workers", 1)
    assert ended.code == 1
    assert f"failed: {reason}" in ended.out
    assert logged(tmp_path) == [("first", 0), (target, 0), ("first", 1)]


def test_folders_of_attempts_are_absolute(
    run_stub: RunStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands run in folders of their own, and the default is a relative path."""
    monkeypatch.chdir(tmp_path)
    ended = run_stub("--work_dir", "relative", "--target", "first", "--seed", 0)
    assert ended.code == 0, ended.out
    assert "first 0: survived: as planned" in ended.out
    assert (tmp_path / "relative").is_dir()


def test_no_attempt_begins_after_the_time(run_stub: RunStub, tmp_path: Path) -> None:
    ended = run_stub("--target", "first", "--attempts", 1000, "--minutes", 1e-6)
    assert ended.code == 0, ended.err
    assert not (tmp_path / "work" / LOG_FILE).exists()


def test_a_last_line_that_was_cut_is_dropped(run_stub: RunStub, tmp_path: Path) -> None:
    run_stub("--target", "first", "--attempts", 2)
    log = tmp_path / "work" / LOG_FILE
    log.write_text(log.read_text()[:-9])
    assert run_stub("--target", "first", "--attempts", 2).code == 0
    assert sorted(logged(tmp_path)) == [("first", 0), ("first", 1)]
    log.write_text('{"a": 1}\n')
    assert "choose another --work_dir" in run_stub("--target", "first").err


def test_unknown_names_are_refused(run_stub: RunStub) -> None:
    ended = run_stub("--target", "frist")
    assert ended.code == 2
    assert 'did you mean "first"?' in ended.err


def test_an_interrupted_run_resumes_and_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "stub_command.py"
    script.write_text(STUB_COMMAND)
    folders = ["--work_dir", str(tmp_path / "work"), "--results", str(tmp_path)]
    flags = ["faults", "--campaign", "stub", "--target", "first,sleeper", *folders]
    log = tmp_path / "work" / LOG_FILE
    with subprocess.Popen(
        [sys.executable, script, *flags, "--num_workers", "2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not (log.exists() and len(logged(tmp_path)) >= 2) and time.monotonic() < deadline:
            time.sleep(0.05)
        workers = children(process.pid, "spawn_main")
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == "stopped by SIGINT\n"
    assert sorted(logged(tmp_path)) == [("first", 0), ("first", 1)]
    assert len(workers) == 2
    assert not any(map(is_running, workers))
