import os
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import torch

from benchmarks import train as rate
from benchmarks.train import (
    TrainRateSettings,
    Window,
    busy_processes,
    create_window,
    precision_of,
)
from tests.support.commands import TINY, Cli
from train.batch import Batch

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
    short = ["--steps", 3, "--warmup_steps", 1, "--repeats", 2, "--busy", 2, "--num_threads", 1]
    ended = cli("benchmarks", "train", *TINY, *flags, *short, "--bf16", "--ema_decay", 0.9)
    assert ended.code == 0, ended.err
    (row,) = pl.read_csv(tmp_path / "train.csv").to_dicts()
    assert row["busy"] == 2 and row["threads"] == 1 and row["workers"] == 0
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


class Prefetching:
    """Batches of loader processes on a simulated clock: each ready after some seconds, a bounded number in advance."""

    def __init__(self, workers: int, prefetched: int, seconds: float) -> None:
        self.now, self.seconds, self.limit = 0.0, seconds, workers * prefetched
        self.ready_at = [seconds * number for number in range(1, self.limit + 1)]

    def clock(self) -> float:
        return self.now

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.now = max(self.now, self.ready_at.pop(0))
            self.ready_at.append(max(self.ready_at[-1], self.now) + self.seconds)
            yield batch(4)


@pytest.mark.parametrize("step", [0.001, 0.008, 0.02], ids=["fast", "a little faster", "slower"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_prefetched_batches_do_not_count_as_loaded(step: float, accumulated: int) -> None:
    """Eight processes make a batch in 10 ms; the first step takes a second, in which they fill their queues."""
    files = Prefetching(workers=8, prefetched=2, seconds=0.01)
    settings = TrainRateSettings(model="test_vit", steps=10, accumulation_steps=accumulated)
    window = create_window(settings, files, CPU, prefetched=files.limit)
    window.clock = files.clock
    for number, _ in enumerate(window):
        files.now += 1.0 if number == 0 else step
    assert len(window) % accumulated == 0
    assert window.rate == pytest.approx(4 / max(step, 0.01), rel=0.1)
    assert (window.waiting / window.seconds > 0.1) == (step < 0.01)


def test_processes_that_keep_the_cores_busy_end_with_the_block() -> None:
    with busy_processes(2):
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        spinning = [
            pid for pid in children if b"getppid" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(spinning) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in spinning)
