from functools import partial
from pathlib import Path

import polars as pl
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from isic.folds import read_folds
from isic.layout import BEST_CHECKPOINT, LAST_CHECKPOINT
from isic.metrics import pauc
from tests.support.commands import TINY, Cli, tiny_settings
from tests.support.training import CPU, peak_rates
from train.batch import Batch
from train.checkpoint import load_checkpoint
from train.deadline import OUT_OF_TIME
from train.history import read_history
from train.loop import batched, select_epoch, train_epoch
from train.state import create_state


@pytest.mark.parametrize(
    ("mode", "selected", "recorded"),
    [
        ("last", [False, False, False, True], [0.1, 0.15, 0.12, 0.14]),
        ("best", [True, True, False, False], [0.1, 0.15, 0.15, 0.15]),
    ],
)
def test_the_saved_epoch_is_the_last_or_the_best(
    mode: str, selected: list[bool], recorded: list[float]
) -> None:
    state = create_state(tiny_settings(), CPU, 0)
    for number, score in enumerate([0.1, 0.15, 0.12, 0.14]):
        state.epoch = number + 1
        assert select_epoch(state, mode, 4, score) == selected[number]
        assert state.best_pauc == recorded[number]


def test_a_first_epoch_without_any_skill_is_selected() -> None:
    state = create_state(tiny_settings(), CPU, 0)
    state.epoch = 2
    assert select_epoch(state, "best", 4, 0.0)


@pytest.mark.parametrize(
    ("flags", "validated"),
    [
        ([], ["subset", "subset", "subset", "all"]),
        (["--validate_every", 2], ["subset", "all", "subset", "all"]),
        (["--select_epoch", "best"], ["all"] * 4),
    ],
)
def test_only_scores_on_all_held_out_rows_count(
    flags: list[object],
    validated: list[str],
    small_dataset: Path,
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.sampling.SUBSET_NEGATIVES", 3)
    places = ["--data", small_dataset, "--output_dir", tmp_path, "--fold", 0]
    ended = cli("train", *TINY, *places, "--epochs", 4, *flags)
    assert ended.code == 0, ended.err
    fold = tmp_path / "tiny" / "fold_0"
    entries = read_history(fold / "history.jsonl")
    oof = pl.read_parquet(fold / "oof.parquet")
    num_positives = int(oof["target"].sum())
    sizes = {"all": len(oof), "subset": num_positives + 3}
    assert [entry["validated"] for entry in entries] == validated
    assert [entry["validated_rows"] for entry in entries] == [sizes[each] for each in validated]
    assert ended.out.count(f"on {sizes['subset']} of {sizes['all']} rows") == validated.count(
        "subset"
    )
    saved = load_checkpoint(fold / BEST_CHECKPOINT)
    assert saved["best_pauc"] == pauc(oof["target"], oof["logit"])
    assert saved["best_pauc"] == entries[saved["epoch"] - 1]["pauc"]
    assert entries[saved["epoch"] - 1]["validated"] == "all"


def test_training_and_validation_are_compiled_once_each(
    small_dataset: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for the folds after the first, and for an incomplete last batch of held-out rows."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    flags = ["--batch_size", 8, "--epochs", 2, "--ema_decay", 0.9, "--num_folds", 3]
    places = ["--data", small_dataset, "--output_dir", tmp_path]
    ended = cli("train", *TINY, *places, *flags, "--compile", "true")
    assert ended.code == 0, ended.err
    assert counter.frame_count == 2


def test_batched_gives_a_shorter_last_group() -> None:
    assert list(batched(range(5), 2)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("model", "size"), [("pvt_v2_b0", 64), ("lambda_resnet26t", 256), ("test_vit.r160_in1k", 32)]
)
def test_a_backbone_that_fits_learns(model: str, size: int) -> None:
    """A patch embedding without a convolution, 5-dimensional weights, and a name with a tag."""
    settings = tiny_settings(model=model, image_size=size)
    state = create_state(settings, CPU, 0)
    batch = Batch(torch.zeros(2, size, size, 3, dtype=torch.uint8), torch.ones(2), torch.arange(2))
    train_epoch(state, state.model, [batch], peak_rates(1), settings, CPU, "fold 0")


def test_a_run_on_other_folds_is_not_resumed(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--epochs", 1]
    assert cli("train", *flags).code == 0
    plan = read_folds(tmp_path / "tiny" / "folds.parquet")
    (tmp_path / "tiny" / "fold_0" / "oof.parquet").unlink()
    ended = cli("train", *flags, "--resume")
    assert ended.code == 2
    assert "its last epoch, but results are missing; train it again with --force" in ended.err
    other = pl.col("fold").replace({0: 1, 1: 0}).cast(pl.Int8)
    type(plan)(plan.table.with_columns(other)).write(tmp_path / "tiny" / "folds.parquet")
    ended = cli("train", *flags, "--resume")
    assert ended.code == 2
    assert "was trained on other folds" in ended.err


def test_a_frozen_backbone_keeps_its_batch_statistics(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--epochs", 2]
    flags += ["--model", "test_resnet", "--freeze_epochs", 1]
    last = tmp_path / "tiny" / "fold_0" / LAST_CHECKPOINT

    def statistics() -> list[torch.Tensor]:
        state = load_checkpoint(last)["model_state_dict"]
        return [value for key, value in state.items() if "running_" in key]

    assert cli("train", *flags, "--max_hours", 1e-9).code == OUT_OF_TIME
    frozen = statistics()
    assert frozen
    # Those of random weights: mean 0 and variance 1.
    assert all(torch.equal(value, torch.full_like(value, value[0])) for value in frozen)
    assert {value[0].item() for value in frozen} == {0.0, 1.0}
    assert cli("train", *flags, "--resume").code == 0
    assert all(not torch.equal(one, two) for one, two in zip(frozen, statistics(), strict=True))
