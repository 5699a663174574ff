from pathlib import Path

import polars as pl
import pytest
import torch
from conftest import TINY, Cli

from benchmarks import train as rate
from benchmarks.train import TrainRateSettings, Window, precision_of
from train.data import Batch

CPU = torch.device("cpu")


def batch(size: int) -> Batch:
    return Batch(
        torch.zeros(size, 4, 4, 3, dtype=torch.uint8), torch.zeros(size), torch.arange(size)
    )


def test_training_is_measured_beside_a_bare_loop(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [
        "--data",
        small_dataset,
        "--results",
        tmp_path,
        "--batch_size",
        4,
        "--accumulation_steps",
        2,
    ]
    short = ["--steps", 3, "--warmup_steps", 1, "--repeats", 2]
    ended = cli("benchmarks", "train", *TINY, *flags, *short, "--bf16", "--ema_decay", 0.9)
    assert ended.code == 0, ended.err
    (row,) = pl.read_csv(tmp_path / "train.csv").to_dicts()
    assert row["what"] == "tiny" and row["precision"] == "bf16" and row["batch"] == "4 x 2"
    assert (
        min(row[name] for name in ("images_per_second", "in_memory", "bare", "mfu", "over_memory"))
        > 0
    )
    assert (
        row["over_bare_min"] <= row["over_bare"] <= row["over_bare_max"] and 0 <= row["waiting"] < 1
    )


def test_a_network_that_draws_has_no_bare_counterpart(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    ended = cli(
        "benchmarks",
        "train",
        *TINY,
        "--data",
        small_dataset,
        "--results",
        tmp_path,
        "--mask_weight",
        1,
    )
    assert ended.code == 2 and "give --mask_weight 0" in ended.err


def test_a_window_counts_what_comes_after_the_warm_up() -> None:
    window = Window(iter([batch(2), batch(3), batch(4), batch(5)]), warmup=1, timed=2, device=CPU)
    assert [len(each.images) for each in window] == [2, 3, 4] and len(window) == 3
    assert (
        window.num_images == 7
        and window.rate == 7 / window.seconds > 0 <= window.waiting <= window.seconds
    )


def test_float32_on_a_gpu_is_called_tf32() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    plain = TrainRateSettings(model="test_vit")
    assert precision_of(plain, gpu) == "tf32" and precision_of(plain, cpu) == "fp32"
    for name in ("fp16", "bf16"):
        low = TrainRateSettings(model="test_vit", **{name: True})
        assert precision_of(low, gpu) == precision_of(low, cpu) == name


def test_the_bare_loop_multiplies_as_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is a name here, because this machine has no GPU."""
    said: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    monkeypatch.setattr(rate, "select_device", lambda name: torch.device("cuda"))
    # Without a GPU the model cannot move; with one, there is no connection.
    with pytest.raises((AssertionError, RuntimeError, AttributeError)):
        rate.serve_bare_loop(None, TrainRateSettings(model="test_vit", pretrained=False))  # type: ignore[arg-type]
    assert said == ["high"]
