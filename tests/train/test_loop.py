from pathlib import Path

import polars as pl
import pytest
import torch

from isic.folds import read_folds
from tests.support.commands import TINY, Cli, tiny_settings
from tests.support.training import CPU, peak_rates
from train.batch import Batch
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
    for number, pauc in enumerate([0.1, 0.15, 0.12, 0.14]):
        state.epoch = number + 1
        assert select_epoch(state, mode, 4, pauc) == selected[number]
        assert state.best_pauc == recorded[number]


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
