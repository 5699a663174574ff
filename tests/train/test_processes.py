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

import polars as pl
import pytest
import torch
from conftest import TINY, Cli

from isic.folds import read_folds
from train.checkpoint import BEST, LAST, load_checkpoint

ROOT = Path(__file__).parents[2]
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
