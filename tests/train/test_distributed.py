import subprocess
from pathlib import Path

import polars as pl
import pytest

from tests.support.commands import ROOT, TINY, Cli
from tests.support.processes import command, history


def run_in_two_processes(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, num_processes=2),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_score_as_one_does(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    """Two processes with batches of 8 take together the batches of one process with 16."""
    hyperparameters = (
        "--num_folds 2 --epochs 3 --lr 1e-3 --ema_decay 0.5 --freeze_epochs 1 --warmup_epochs 0 "
        "--augmentation none"
    )
    flags = ["--data", small_dataset, *hyperparameters.split()]
    alone = ["--batch_size", 16, "--output_dir", tmp_path / "one"]
    assert cli("train", *TINY, *flags, *alone).code == 0
    together = ["--batch_size", 8, "--output_dir", tmp_path / "two"]
    ended = run_in_two_processes(*flags, *together)
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
    ended = run_in_two_processes(*flags, *together)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("fold 1 is finished") == 1
