import subprocess
from pathlib import Path

import pytest
import torch

from isic.layout import BEST_CHECKPOINT, LAST_CHECKPOINT
from tests.support.commands import ROOT, TINY, Cli, tiny_settings
from tests.support.processes import command, history
from train.checkpoint import load_checkpoint
from train.deadline import OUT_OF_TIME, Deadline, OutOfTime


def test_an_epoch_fits_if_one_as_long_as_the_longest_does() -> None:
    now = 100.0
    deadline = Deadline(1.0, lambda: now)
    now += 60  # reading the data
    deadline.begin_fold()
    assert deadline.allows_epoch(), "nothing is known of its length"
    now += 1200
    deadline.end_epoch()
    now += 600
    deadline.end_epoch()
    now += 540
    assert deadline.allows_epoch(), "it ends on the second"
    now += 1
    assert not deadline.allows_epoch(), "the longest counts, not the last"


def test_an_epoch_of_more_rows_needs_more_time() -> None:
    now = 0.0
    deadline = Deadline(1.0, lambda: now)
    for cost, seconds in ((1.0, 100), (5.0, 450), (0.5, 60)):
        now += seconds
        deadline.end_epoch(cost)
    now = 3600 - 600.0
    assert deadline.allows_epoch(5.0), "120 s per unit"
    assert not deadline.allows_epoch(5.1)


def test_the_time_between_folds_is_no_epoch() -> None:
    now = 0.0
    deadline = Deadline(1.0, lambda: now)
    for _ in range(3):
        deadline.begin_fold()
        now += 1000
        deadline.end_epoch()
        now += 100
    now = 2600.0
    assert deadline.allows_epoch(), "one of 1000 s ends on the second"
    now += 1
    assert not deadline.allows_epoch()


def test_without_a_limit_every_epoch_fits() -> None:
    now = 0.0
    deadline = Deadline(None, lambda: now)
    now = 1e12
    deadline.end_epoch()
    assert deadline.allows_epoch()


def test_the_message_names_what_remains_and_how_to_continue() -> None:
    settings = tiny_settings(max_hours=11.5)
    assert OutOfTime(2, 5).describe(settings, [0, 2, 3, 4]) == (
        "stopped before epoch 5 of fold 2, which would not end within --max_hours 11.5; the same "
        "command with --resume continues, then trains folds 3, 4"
    )
    assert OutOfTime(4, 5).describe(settings, [3, 4]).endswith("with --resume continues")
    assert OutOfTime(3, 5).describe(settings, [3, 4]).endswith("continues, then trains fold 4")
    forced = tiny_settings(max_hours=11.5, force=True)
    assert (
        OutOfTime(3, 1)
        .describe(forced, [3, 4])
        .endswith(
            "with --resume in place of --force continues; then train fold 4 with --fold and --force"
        )
    )


def test_a_run_in_pieces_gives_the_bits_of_a_whole_one(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    """Every command ends after one epoch; two folds of two epochs take four of them."""
    # fmt: off
    flags = [
        *TINY, "--data", small_dataset, "--num_folds", 2, "--epochs", 2, "--batch_size", 8,
        "--num_threads", 1, "--ema_decay", 0.9, "--freeze_epochs", 1, "--layer_decay", 0.9,
        "--drop_rate", 0.1, "--bf16",
    ]
    # fmt: on
    assert cli("train", *flags, "--output_dir", tmp_path / "whole").code == 0
    resumed = [*flags, "--output_dir", tmp_path / "pieces", "--resume"]
    messages = []
    for _ in range(3):
        ended = cli("train", *resumed, "--max_hours", 1e-9)
        assert ended.code == OUT_OF_TIME
        (message,) = ended.err.splitlines()
        messages.append(message)
    assert "stopped before epoch 2 of fold 0, which would not end within" in messages[0]
    assert "the same command with --resume continues, then trains fold 1" in messages[0]
    assert "stopped before epoch 1 of fold 1" in messages[1]
    assert "stopped before epoch 2 of fold 1" in messages[2]
    ended = cli("train", *resumed)
    assert ended.code == 0, ended.err
    assert "pooled" in ended.out
    for fold in ("fold_0", "fold_1"):
        whole, pieces = (tmp_path / name / "tiny" / fold for name in ("whole", "pieces"))
        assert (whole / "oof.parquet").read_bytes() == (pieces / "oof.parquet").read_bytes()
        assert history(whole) == history(pieces)
        for name in (BEST_CHECKPOINT, LAST_CHECKPOINT):
            one, two = (load_checkpoint(folder / name) for folder in (whole, pieces))
            for key in ("model_state_dict", "optimizer_state_dict"):
                assert equal(one[key], two[key]), (name, key)


def equal(one: object, two: object) -> bool:
    """Return whether nested dicts and lists hold the same values, tensors by their bits."""
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(equal, one, two))
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return torch.equal(one, two)
    return one == two


@pytest.mark.slow
def test_two_processes_stop_together(small_dataset: Path, tmp_path: Path) -> None:
    flags = ["--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--epochs", 3]
    run = command(*flags, "--max_hours", 1e-9, num_processes=2)
    ended = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 1, "torchrun's own code"
    assert ended.stderr.count("stopped before epoch 2 of fold 0") == 1
    assert ended.stderr.count(f"exitcode  : {OUT_OF_TIME}") >= 1, ended.stderr
    assert load_checkpoint(tmp_path / "tiny" / "fold_0" / LAST_CHECKPOINT)["epoch"] == 1
