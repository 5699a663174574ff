import subprocess
from pathlib import Path

import polars as pl
import pytest

from tests.support.commands import ROOT, TINY, Cli
from tests.support.processes import command, history


@pytest.mark.slow
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
    assert ended.returncode == 0
    assert ended.stdout.count("fold 1 is finished") == 1
