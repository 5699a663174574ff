"""`train --fold all`: a network that is trained on every row."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import polars as pl
import pytest
import torch

from isic.folds import read_folds
from isic.layout import ALL, BEST_CHECKPOINT, LAST_CHECKPOINT, OOF_FILE
from isic.provenance import read_seen
from isic.runtime.files import read_manifest
from tests.support.commands import ROOT, TINY, Cli, tiny_settings
from tests.support.processes import command, kill, started, wait_for
from train.checkpoint import load_checkpoint
from train.resume import is_finished

FLAGS = ("--fold", ALL, "--epochs", 2)


def weights(fold: Path, name: str = BEST_CHECKPOINT) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_checkpoint(fold / name)["model_state_dict"]
    return state


def assert_equal_weights(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_it_trains_on_every_row_and_has_no_score(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    ended = cli("train", *TINY, "--data", small_dataset, "--output_dir", tmp_path, *FLAGS)
    assert ended.code == 0, ended.err
    assert "no score: every row was trained on" in ended.out
    assert "pAUC" not in ended.out
    run = tmp_path / "tiny"
    assert [path.name for path in run.glob("fold_*")] == ["fold_all"]
    fold = run / "fold_all"
    assert not (fold / OOF_FILE).exists()
    seen = read_seen(fold / "trained_on.parquet")
    table = pl.read_csv(small_dataset / "train-metadata.csv")
    assert sorted(seen["isic_id"]) == sorted(table["isic_id"])

    entries = [json.loads(line) for line in (fold / "history.jsonl").read_text().splitlines()]
    assert [(entry["fold"], entry["epoch"], entry["validated"]) for entry in entries] == [
        (ALL, 1, "none"),
        (ALL, 2, "none"),
    ]
    assert not any({"pauc", "auc"} & set(entry) for entry in entries)

    manifest = read_manifest(fold / BEST_CHECKPOINT)
    assert (manifest["fold"], manifest["pauc"], manifest["epoch"]) == (ALL, None, 2)
    assert manifest["folds_digest"] == read_folds(run / "folds.parquet").digest
    card = (fold / "backbone" / "README.md").read_text()
    assert "none was held out" in card
    assert "model-index" not in card


def test_it_is_skipped_when_finished_and_repeated_by_force(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--epochs", 2]
    settings = tiny_settings(data=small_dataset, name="tiny", output_dir=tmp_path, epochs=2)
    assert not is_finished(settings, ALL)
    assert cli("train", *flags, "--fold", ALL).code == 0
    first = weights(tmp_path / "tiny" / "fold_all")
    assert is_finished(settings, ALL)
    again = cli("train", *flags, "--fold", ALL)
    assert "fold all is finished" in again.out
    assert "no score" in again.out
    other = cli("train", *flags, "--fold", ALL, "--lr", 0.5)
    assert (other.code, "lr=" in other.err) == (2, True)
    assert cli("train", *flags, "--fold", ALL, "--force").code == 0
    repeated = weights(tmp_path / "tiny" / "fold_all")
    assert all(torch.equal(first[key], repeated[key]) for key in first)


def test_without_the_flag_only_numbered_folds_are_trained(trained: Path) -> None:
    assert sorted(path.name for path in trained.glob("fold_*")) == ["fold_0", "fold_1", "fold_2"]


def test_its_weights_are_those_of_no_numbered_fold(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1]
    for fold in (0, ALL):
        assert cli("train", *flags, "--fold", fold).code == 0
    run = tmp_path / "tiny"
    one, other = weights(run / "fold_0"), weights(run / "fold_all")
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--select_epoch", "best"], "holds no row out to select an epoch on"),
        (["--validate_every", 1], "holds no row out to validate on"),
    ],
)
def test_a_setting_that_needs_held_out_rows_is_refused(
    flags: list[object], words: str, small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    where = ["--data", small_dataset, "--output_dir", tmp_path / "out"]
    ended = cli("train", *TINY, *where, *FLAGS, *flags)
    assert ended.code == 2
    assert words in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fold", ["some", "-1", "1.5", "oof"])
def test_another_word_or_number_is_refused(fold: str, cli: Cli) -> None:
    ended = cli("train", *TINY, "--fold", fold)
    assert ended.code == 2
    assert "a fold is a number from 0 on, or all" in ended.err
    assert ended.err.count("\n") == 1


def test_a_numbered_fold_cannot_start_from_its_weights(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    where = ["--data", small_dataset, "--output_dir", tmp_path]
    assert cli("train", *TINY, *where, "--fold", ALL, "--epochs", 1).code == 0
    backbone = tmp_path / "tiny" / "fold_all" / "backbone"
    flags = [*TINY, *where, "--name", "next", "--epochs", 1, "--pretrained", backbone]
    for fold in (0, 4):
        ended = cli("train", *flags, "--fold", fold)
        assert ended.code == 2
        assert "learned from 12 of the 12 held-out rows" in ended.err
    # Copied elsewhere, with its list or without it, it is recognised as well.
    copy = shutil.copytree(backbone, tmp_path / "copy")
    ended = cli("train", *flags[:-1], copy, "--fold", 0)
    assert (ended.code, "its list of images is not next to it" in ended.err) == (2, True)
    assert not (tmp_path / "next").exists()


def test_it_may_start_from_weights_that_have_seen_any_row(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    where = ["--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1]
    assert cli("train", *TINY, *where, "--fold", 0).code == 0
    run = tmp_path / "tiny"
    flags = [*TINY, *where, "--name", "next", "--fold", ALL]
    ended = cli("train", *flags, "--pretrained", run / "fold_0" / "backbone")
    assert ended.code == 0, ended.err
    # Of a whole run it takes the network of all rows.
    assert cli("train", *TINY, *where, "--fold", ALL).code == 0
    ended = cli("train", *flags, "--force", "--pretrained", run)
    assert ended.code == 0, ended.err
    source = read_manifest(tmp_path / "next" / "fold_all" / BEST_CHECKPOINT)["pretrained"]["source"]
    assert source == str(run / "fold_all" / "backbone" / "model.safetensors")


def test_a_time_limit_stops_it_and_resume_continues(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [*TINY, "--data", small_dataset, *FLAGS, "--ema_decay", 0.9]
    assert cli("train", *flags, "--output_dir", tmp_path / "whole").code == 0
    pieces = [*flags, "--output_dir", tmp_path / "pieces"]
    stopped = cli("train", *pieces, "--max_hours", 1e-9)
    assert stopped.code == 75
    assert "stopped before epoch 2 of fold all" in stopped.err
    begun = cli("train", *pieces)
    assert (begun.code, "has 1 of 2 epochs" in begun.err) == (2, True)
    assert cli("train", *pieces, "--resume").code == 0
    assert_equal_weights(*(tmp_path / name / "tiny" / "fold_all" for name in ("whole", "pieces")))


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_killed_run_resumes_to_the_same_weights(
    num_processes: int, small_dataset: Path, tmp_path: Path
) -> None:
    flags = ["--data", small_dataset, *FLAGS, "--batch_size", 4, "--positive_repeats", 60]
    flags += ["--augmentation", "light", "--ema_decay", 0.9]

    def run(*more: object) -> None:
        line = command(*flags, *more, num_processes=num_processes)
        subprocess.run(line, cwd=ROOT, check=True, timeout=200, capture_output=True)

    run("--output_dir", tmp_path / "whole")
    whole, halves = (tmp_path / name / "tiny" / "fold_all" for name in ("whole", "halves"))
    with started(
        *flags, "--output_dir", tmp_path / "halves", num_processes=num_processes
    ) as process:
        wait_for(halves / "history.jsonl", process)
        while load_checkpoint(halves / LAST_CHECKPOINT)["epoch"] < 1:
            time.sleep(0.005)
        kill(process)
        assert process.returncode == -signal.SIGKILL
    assert not (halves / BEST_CHECKPOINT).exists(), "it was killed in the second epoch"
    run("--output_dir", tmp_path / "halves", "--resume")
    assert_equal_weights(whole, halves)
