import socket
import subprocess
import time
from pathlib import Path

import polars as pl
import pytest
import torch

from isic.layout import BEST_CHECKPOINT, LAST_CHECKPOINT
from isic.runtime.only_writer import only_writer
from tests.support.commands import ROOT, TINY, Cli
from tests.support.processes import LONG_EPOCHS, command, history, kill, running, started, wait_for
from train.checkpoint import load_checkpoint


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
    # The small dataset's target is also an auxiliary one here.
    flags = ["--data", small_dataset, *hyperparameters.split(), "--aux", "mal: target"]
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
        for column in ("logit", "aux.mal"):
            assert (one[column] - two[column]).abs().max() < 1e-3  # type: ignore[operator]
        histories = [history(tmp_path / run / "tiny" / f"fold_{fold}") for run in ("one", "two")]
        for mine, theirs in zip(*histories, strict=True):
            assert mine == pytest.approx(theirs, abs=0.02)
    ended = run_in_two_processes(*flags, *together)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("fold 1 is finished") == 1


@pytest.mark.slow
def test_two_processes_end_together_if_the_fold_is_held(
    small_dataset: Path, tmp_path: Path
) -> None:
    """Without torchrun, which may end the second one before it fails."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    train = command("--data", small_dataset, "--output_dir", tmp_path, "--fold", 0)
    with (
        only_writer(tmp_path / "tiny" / "fold_0"),
        running(train, RANK="0", **group) as main,
        running(train, RANK="1", **group) as other,
    ):
        words = f"is writing {tmp_path}/tiny/fold_0; wait for its end"
        assert words in main.communicate(timeout=100)[1]
        assert other.communicate(timeout=100)[1] == ""
    assert (main.returncode, other.returncode) == (2, 2)


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.mark.slow
@pytest.mark.parametrize("augment_on", ["workers", "device"])
def test_two_killed_processes_resume_to_the_same_result(
    augment_on: str, small_dataset: Path, tmp_path: Path
) -> None:
    flags = [*LONG_EPOCHS.split(), "--data", small_dataset, "--augmentation", "medium"]
    flags += ["--augment_on", augment_on]
    ended = run_in_two_processes(*flags, "--cache", "none", "--output_dir", tmp_path / "whole")
    assert ended.returncode == 0, ended.stderr
    whole, halves = (tmp_path / name / "tiny" / "fold_0" for name in ("whole", "halves"))
    output = ("--output_dir", tmp_path / "halves")
    with started(*flags, *output, num_processes=2) as process:
        wait_for(halves / "history.jsonl", process)
        while load_checkpoint(halves / LAST_CHECKPOINT)["epoch"] < 1:
            time.sleep(0.005)
        time.sleep(0.1)
        kill(process)
    assert len(history(halves)) == 1, "it was killed in the second epoch"
    ended = run_in_two_processes(*flags, *output, "--resume")
    assert ended.returncode == 0, ended.stderr
    assert (whole / "oof.parquet").read_bytes() == (halves / "oof.parquet").read_bytes()
    assert history(whole) == history(halves)
    states = [
        load_checkpoint(folder / BEST_CHECKPOINT)["model_state_dict"] for folder in (whole, halves)
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
