import contextlib
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import polars as pl
import pytest
import torch

from benchmarks import train as rate
from benchmarks.settings import TrainRateSettings
from benchmarks.train import (
    TimedBatches,
    busy_processes,
    precision_of,
    random_batches,
    read_files,
    time_batches,
)
from tests.support.commands import TINY, Cli, split_flags
from train.augmentation.device import create_device_augmentation
from train.augmentation.levels import DEVICE_LEVELS
from train.batch import Batch

CPU = torch.device("cpu")


def batch(size: int) -> Batch:
    return Batch(
        torch.zeros(size, 4, 4, 3, dtype=torch.uint8), torch.zeros(size), torch.arange(size)
    )


@pytest.mark.slow
def test_training_is_measured_against_a_bare_loop(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    places = ("--data", small_dataset, "--results", tmp_path)
    flags = split_flags(
        "--batch_size 4 --accumulation_steps 2 --num_threads 1 --ema_decay 0.9 --bf16"
    )
    short = split_flags("--steps 3 --warmup_steps 1 --repeats 2 --busy 2")
    ended = cli("benchmarks", "train", *TINY, *places, *short, *flags)
    assert ended.code == 0, ended.err
    (row,) = pl.read_csv(tmp_path / "train.csv").to_dicts()
    assert row["busy"] == 2
    assert row["threads"] == 1
    assert row["workers"] == 0
    assert row["what"] == "tiny"
    assert row["precision"] == "bf16"
    assert row["batch"] == "4 x 2"
    for name in ("images_per_second", "in_memory", "bare", "mfu", "over_memory"):
        assert row[name] > 0
    assert row["over_bare_min"] <= row["over_bare"] <= row["over_bare_max"]
    assert 0 <= row["waiting"] < 1


def test_a_network_with_masks_has_no_bare_counterpart(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ("--data", small_dataset, "--results", tmp_path, "--mask_weight", 1)
    ended = cli("benchmarks", "train", *TINY, *flags)
    assert ended.code == 2
    assert "give --mask_weight 0" in ended.err


def test_a_network_with_auxiliary_targets_has_no_bare_counterpart(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ("--data", small_dataset, "--results", tmp_path, "--aux", "mal: target")
    ended = cli("benchmarks", "train", *TINY, *flags)
    assert ended.code == 2
    assert 'give --aux ""' in ended.err


@pytest.mark.parametrize("level", DEVICE_LEVELS)
def test_batches_in_memory_can_be_augmented_on_the_device(level: str) -> None:
    """As a GPU does by default."""
    settings = TrainRateSettings(
        model="test_vit", image_size=32, batch_size=3, augmentation=level, augment_on="device"
    )
    augment = create_device_augmentation(settings.augmentation, settings.augment_on, CPU)
    for noise in random_batches(settings, CPU):
        augmented = augment(noise)
        assert augmented.images.shape == noise.images.shape
        assert not torch.equal(augmented.images[0], augmented.images[1])


def test_only_batches_after_the_warm_up_count() -> None:
    batches = iter([batch(2), batch(3), batch(4), batch(5)])
    timed = TimedBatches(batches, warmup=1, timed=2, device=CPU)
    assert [len(each.images) for each in timed] == [2, 3, 4]
    assert len(timed) == 3
    assert timed.num_images == 7
    assert timed.rate == 7 / timed.seconds
    assert timed.seconds > 0
    assert 0 <= timed.waiting <= timed.seconds


def test_float32_on_a_gpu_is_called_tf32() -> None:
    gpu = torch.device("cuda")
    plain = TrainRateSettings(model="test_vit", precision="fp32")
    assert precision_of(plain, gpu) == "tf32"
    assert precision_of(plain, CPU) == "fp32"
    for name in ("fp16", "bf16"):
        low = TrainRateSettings(model="test_vit", **{name: True})
        assert precision_of(low, gpu) == precision_of(low, CPU) == name


def test_the_bare_loop_multiplies_as_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is a name here, because this machine has no GPU."""
    precisions: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    monkeypatch.setattr(rate, "select_device", lambda name: torch.device("cuda"))
    # Without a GPU the model cannot move; with one, there is no connection.
    with pytest.raises((AssertionError, RuntimeError, AttributeError)):
        settings = TrainRateSettings(model="test_vit", pretrained=False)
        rate.serve_bare_loop(None, settings)  # type: ignore[arg-type]
    assert precisions == ["high"]


class Prefetching:
    """Batches of loader processes on a simulated clock, a bounded number of them in advance."""

    def __init__(self, workers: int, prefetched: int, seconds: float) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.limit = workers * prefetched
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
@pytest.mark.parametrize("workers", [8, 16])
def test_prefetched_batches_do_not_count_as_loaded(
    step: float, accumulated: int, workers: int
) -> None:
    """A batch takes 10 ms; the first step takes a second, in which the queues fill up."""
    files = Prefetching(workers, prefetched=2, seconds=0.01)
    settings = TrainRateSettings(model="test_vit", steps=10, accumulation_steps=accumulated)
    timed = time_batches(settings, files, CPU, prefetched=files.limit)
    timed.clock = files.clock
    for number, _ in enumerate(timed):
        files.now += 1.0 if number == 0 else step
    assert len(timed) % accumulated == 0
    assert timed.rate == pytest.approx(4 / max(step, 0.01), rel=0.1)
    assert (timed.waiting / timed.seconds > 0.1) == (step < 0.01)


@pytest.mark.slow
def test_an_epoch_shorter_than_the_queues_never_ends(small_dataset: Path) -> None:
    settings = TrainRateSettings(
        model="test_vit",
        image_size=32,
        data=small_dataset,
        batch_size=4,
        num_workers=2,
        positive_repeats=1,
        negatives_per_positive=0.1,
    )
    files = read_files(settings)
    for _ in range(2):  # the workers stay, and start over for each repeat
        batches = list(islice(files, 20))
        assert [len(each.images) for each in batches] == [4] * 20
    epoch = torch.cat([each.rows for each in batches]).unique()
    assert len(epoch) < 20, "fewer rows than the batches hold"


def test_processes_that_keep_the_cores_busy_end_with_the_block() -> None:
    with busy_processes(2):
        deadline = time.monotonic() + 30
        while len(spinning := spinning_children()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)  # a process that has just been started has no command line yet
        assert len(spinning) == 2
    for path in spinning:
        assert not path.exists()


def spinning_children() -> list[Path]:
    """Return the busy children of this process in /proc; its own list of children may lack some."""
    found = []
    for path in (path for path in Path("/proc").iterdir() if path.name.isdigit()):
        with contextlib.suppress(OSError):  # it ended meanwhile
            is_child = f"PPid:\t{os.getpid()}\n" in (path / "status").read_text()
            if is_child and b"getppid" in (path / "cmdline").read_bytes():
                found.append(path)
    return found
