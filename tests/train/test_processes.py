"""Training as processes see it: killed, told to stop, or started several times by torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch

from isic.folds import read_folds
from tests.support.commands import ROOT, TINY, Cli
from train import machine
from train.checkpoint import BEST, LAST, load_checkpoint

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


def test_a_run_killed_within_an_epoch_goes_on_to_the_same_end(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [*LONG_EPOCHS, "--data", small_dataset, "--augmentation", "light"]
    assert cli("train", *TINY, *flags, "--output_dir", tmp_path / "whole").code == 0
    whole, halves = (tmp_path / name / "tiny" / "fold_0" for name in ("whole", "halves"))
    with started(*flags, "--output_dir", tmp_path / "halves") as process:
        wait_for(halves / "history.jsonl", process)
        while load_checkpoint(halves / LAST)["epoch"] < 1:
            time.sleep(0.005)
        time.sleep(0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert len(history(halves)) == 1 and not (halves / BEST).exists(), (
        "it was killed in the second epoch"
    )

    resumed = (*flags, "--output_dir", tmp_path / "halves", "--resume")
    ended = cli("train", *TINY, *resumed, "--lr", 0.5)
    assert ended.code == 2 and "lr=" in ended.err
    assert cli("train", *TINY, *resumed).code == 0
    assert (whole / "oof.parquet").read_bytes() == (halves / "oof.parquet").read_bytes()
    assert history(whole) == history(halves)
    states = [load_checkpoint(folder / BEST)["model_state_dict"] for folder in (whole, halves)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_run_on_other_folds_does_not_go_on(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--epochs", 1]
    assert cli("train", *flags).code == 0
    plan = read_folds(tmp_path / "tiny" / "folds.parquet")
    (tmp_path / "tiny" / "fold_0" / "oof.parquet").unlink()
    ended = cli("train", *flags, "--resume")
    assert ended.code == 2 and "done, but its results are gone; add --force" in ended.err
    other = pl.col("fold").replace({0: 1, 1: 0}).cast(pl.Int8)
    type(plan)(plan.table.with_columns(other)).write(tmp_path / "tiny" / "folds.parquet")
    ended = cli("train", *flags, "--resume")
    assert ended.code == 2 and "was trained on other folds" in ended.err


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_signal_ends_a_run_cleanly(
    number: signal.Signals, workers: int, small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [
        *LONG_EPOCHS,
        "--data",
        small_dataset,
        "--output_dir",
        tmp_path,
        "--num_workers",
        workers,
    ]
    last = tmp_path / "tiny" / "fold_0" / LAST
    with started(*flags) as process:
        wait_for(last, process)
        time.sleep(0.2)
        os.killpg(process.pid, number)  # as a terminal does: to the loader's processes as well
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert (
        f"stopped by {number.name}; the same command with --resume goes on" in err
        and "Traceback" not in err
    )
    assert load_checkpoint(last)["epoch"] == 0
    assert cli("train", *TINY, *flags, "--num_workers", 0, "--resume").code == 0


def test_two_processes_score_as_one_does(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    """Two processes with batches of 8 take the very batches that one process with 16 takes."""
    flags = [
        "--data",
        small_dataset,
        "--num_folds",
        2,
        "--epochs",
        3,
        "--lr",
        1e-3,
        "--ema_decay",
        0.5,
    ]
    flags += ["--freeze_epochs", 1, "--warmup_epochs", 0, "--augmentation", "none"]
    assert (
        cli("train", *TINY, *flags, "--batch_size", 16, "--output_dir", tmp_path / "one").code == 0
    )
    start = command(
        *flags,
        "--batch_size",
        8,
        "--accumulation_steps",
        1,
        "--output_dir",
        tmp_path / "two",
        torchrun=2,
    )
    ended = subprocess.run(
        start, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("checkpoints in") == 1, "one process prints"
    for fold in range(2):
        one, two = (
            pl.read_parquet(tmp_path / run / "tiny" / f"fold_{fold}" / "oof.parquet")
            for run in ("one", "two")
        )
        assert one["isic_id"].equals(two["isic_id"]), "every held-out row once"
        assert (one["logit"] - two["logit"]).abs().max() < 1e-3  # type: ignore[operator]
        histories = [history(tmp_path / run / "tiny" / f"fold_{fold}") for run in ("one", "two")]
        for mine, theirs in zip(*histories, strict=True):
            assert mine == pytest.approx(theirs, abs=0.02)
    ended = subprocess.run(
        start, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0 and ended.stdout.count("fold 1 is finished") == 1


def test_a_convolution_that_damages_the_heap_is_avoided() -> None:
    """In a process of its own: torch would end this one with a segmentation fault or an abort."""
    script = """
import torch
from train.config import TrainSettings
from train.data import Batch
from train.loop import train_epoch
from train.state import create_state
settings = TrainSettings(model="mobileone_s0", pretrained=False, image_size=64, batch_size=2)
cpu, rates = torch.device("cpu"), dict.fromkeys(("backbone", "head"), [0.1] * 4)
batch = Batch(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), torch.ones(2), torch.arange(2))
state = create_state(settings, cpu, 0)
train_epoch(state, state.model, [batch] * 4, rates, settings, cpu, "fold 0")
print("learnt")
"""
    strict = {**os.environ, "LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=strict,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0 and ended.stdout == "learnt\n", ended.stderr


def run_with_shared_memory(size: str, script: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a mount namespace of its own whose /dev/shm has some size; skips if that is not allowed."""
    unshare = ["unshare", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run([*unshare, mount], capture_output=True, check=False).returncode:
        pytest.skip("only root may mount another /dev/shm")
    return subprocess.run(
        [*unshare, f'{mount} && exec "$@"', "sh", sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


CLAIM_MORE = "import shutil; shutil.disk_usage = lambda path: type('Usage', (), {'free': 2**30})"
"""Another program may take the shared memory after it was looked at."""


@pytest.mark.parametrize("claim", ["", CLAIM_MORE])
def test_little_shared_memory_is_one_sentence(
    claim: str, small_dataset: Path, tmp_path: Path
) -> None:
    flags = ["--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    flags += ["--batch_size", 16, "--image_size", 64, "--positive_repeats", 8, "--num_workers", 4]
    arguments = [str(part) for part in ("train", *TINY, *flags)]
    script = f"{claim}\nimport runpy, sys; sys.argv = {arguments!r}; runpy.run_module('train', run_name='__main__')"
    ended = run_with_shared_memory("1m", script)
    assert "Traceback" not in ended.stderr
    assert "--shm-size" in ended.stderr and "--num_workers" in ended.stderr
    if claim:
        assert ended.returncode == 2 and "error: the workers that decode images" in ended.stderr
    else:
        assert ended.returncode == 0, ended.stderr
        warning = "have room for few batches of 4 workers; 2 are used, with one batch each"
        assert ended.stderr.count(warning) == 1


def loader_processes(parent: int) -> list[int]:
    """Children that run the same command: torch's resource tracker is not among them."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [
        int(child)
        for child in children
        if "-m\0train" in Path(f"/proc/{child}/cmdline").read_text()
    ]


def test_a_worker_that_is_killed_is_one_sentence(small_dataset: Path, tmp_path: Path) -> None:
    flags = [*LONG_EPOCHS, "--data", small_dataset, "--output_dir", tmp_path, "--num_workers", 1]
    with started(*flags) as process:
        wait_for(tmp_path / "tiny" / "fold_0" / LAST, process)
        while not (workers := loader_processes(process.pid)):
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(0.2)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err, err
    assert "error: a worker that decodes images has ended" in err and "--resume" in err


def test_workers_fit_into_shared_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fitting(megabytes: int, *, held: int = 2, processes: int = 1) -> tuple[int, int]:
        usage = SimpleNamespace(free=megabytes * 2**20)
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        return machine.fit_workers(8, 2**20 - machine.TENSOR_OVERHEAD, held)

    assert fitting(18) == (8, 2) and capsys.readouterr().err == ""
    assert fitting(17) == (8, 1) and fitting(6) == (4, 1) and fitting(2) == (0, 1)
    assert fitting(18, held=12) == (6, 1) and fitting(18, processes=2) == (7, 1)
    assert "have room for few batches of 8 workers; 7 are used" in capsys.readouterr().err
    assert machine.fit_workers(0, 2**40, 2)[0] == 0
