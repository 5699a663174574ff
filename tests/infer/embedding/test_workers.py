import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest

from infer.embedding.workers import core_slice
from tests.support.commands import ROOT
from tests.support.fake_run import FakeRun, make_fake_run, shard_bytes
from tests.support.proc import children, is_running

WORKERS_WITHOUT_CORES = """
from infer.embedding import workers
from infer.__main__ import COMMANDS
from isic.runtime.cli import run

if __name__ == "__main__":  # workers import this file too
    workers.core_slice = lambda *arguments: [100_000]
    run(COMMANDS)
"""


def test_cores_are_shared_out() -> None:
    assert [core_slice([4, 5, 6, 7], index, 2) for index in range(2)] == [[4, 5], [6, 7]]
    assert [core_slice([0, 1], index, 3) for index in range(3)] == [[0], [1], [0]]


@pytest.mark.slow
def test_several_processes_give_the_same_bytes(
    whole: Path, fake_run: FakeRun, tmp_path: Path
) -> None:
    ended = fake_run.run(tmp_path, "--num_processes", 3)
    assert ended.returncode == 0, ended.stderr
    assert "images=300" in ended.stdout
    assert shard_bytes(tmp_path / "null") == shard_bytes(whole)


@pytest.mark.slow
def test_the_shards_of_a_lost_worker_are_embedded_again(tmp_path: Path) -> None:
    slow = make_fake_run(tmp_path / "slow", images_per_second=100)
    assert slow.run(tmp_path / "whole").returncode == 0
    command = slow.command(tmp_path / "lost", "--num_processes", 2)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not shard_bytes(tmp_path / "lost") and process.poll() is None:
        time.sleep(0.02)
    os.kill(children(process.pid, "spawn_main")[-1], signal.SIGKILL)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "a worker was lost (exit code -9)" in errors
    assert "images=300" in out
    assert shard_bytes(tmp_path / "lost") == shard_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_the_work_of_a_lost_decoder_is_repeated(tmp_path: Path) -> None:
    slow = make_fake_run(tmp_path / "slow", images_per_second=100)
    assert slow.run(tmp_path / "whole").returncode == 0
    process = start_with_decoders(slow, tmp_path / "lost")
    os.kill(decoders(process.pid)[0], signal.SIGKILL)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors == "a decoder process was lost (exit code -9); its images are decoded again\n"
    assert "images=300" in out
    assert shard_bytes(tmp_path / "lost") == shard_bytes(tmp_path / "whole")


def start_with_decoders(run: FakeRun, output: Path) -> "subprocess.Popen[str]":
    """Start to embed with two decoder processes, and return once the first shard is written."""
    command = run.command(output, "--decode_in", "processes", "--num_threads", 2)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not shard_bytes(output) and process.poll() is None:
        time.sleep(0.02)
    return process


def decoders(pid: int) -> list[int]:
    """Return the decoder processes of a run, which are children of its fork server."""
    (server,) = children(pid, "forkserver")
    return children(server, "forkserver")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_a_run_that_is_ended(number: signal.Signals, tmp_path: Path) -> None:
    """Nor does memory: it has no name. The same command then ends with the same bytes."""
    slow = make_fake_run(tmp_path / "slow", images_per_second=100)
    assert slow.run(tmp_path / "whole").returncode == 0
    process = start_with_decoders(slow, tmp_path / "ended")
    (server,) = children(process.pid, "forkserver")
    found = [server, *decoders(process.pid)]
    assert len(found) == 3
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), errors
    deadline = time.monotonic() + 60
    while any(map(is_running, found)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, found))
    resumed = slow.run(tmp_path / "ended", "--decode_in", "processes")
    assert resumed.returncode == 0, resumed.stderr
    assert shard_bytes(tmp_path / "ended") == shard_bytes(tmp_path / "whole")


def test_an_error_of_a_worker_reaches_the_user(fake_run: FakeRun, tmp_path: Path) -> None:
    data = shutil.copytree(fake_run.data, tmp_path / "data")
    with h5py.File(data / "train-image.hdf5", "a") as file:
        for row in range(30):
            del file[f"ISIC_{row:07d}"]
    ended = FakeRun(data, fake_run.model_dir).run(tmp_path / "out", "--num_processes", 2)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "cannot be used (" in ended.stderr
    assert "no image for this id" in ended.stderr


def test_workers_that_all_die_end_the_run(fake_run: FakeRun, tmp_path: Path) -> None:
    """Their cores do not exist, so every round fails."""
    (tmp_path / "run.py").write_text(WORKERS_WITHOUT_CORES)
    command = [
        sys.executable,
        str(tmp_path / "run.py"),
        *fake_run.flags(tmp_path / "out", "--num_processes", 2),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 2
    assert "every worker was lost before it finished one" in ended.stderr
