"""The number of threads that torch computes with on a CPU."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, Cli

from train import threads
from train.checkpoint import load_checkpoint
from train.threads import measure


class Clock:
    """Seconds that pass only when a pass is run, by the number of threads at that time."""

    def __init__(self, seconds_per_image: dict[int, float]) -> None:
        self.seconds_per_image, self.now = seconds_per_image, 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, num_images: int) -> None:
        self.now += num_images * self.seconds_per_image[torch.get_num_threads()]


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("two_threads", "fastest"), [(0.001, 2), (0.1, 1)], ids=["idle machine", "busy machine"]
)
def test_the_faster_number_is_found(two_threads: float, fastest: int) -> None:
    clock = Clock({1: 0.002, 2: two_threads})
    rates = measure(clock.run, batch_size=32, counts=[1, 2], clock=clock)
    assert max(rates, key=lambda count: rates[count]) == fastest
    assert rates[1] == pytest.approx(500)
    assert rates[2] == pytest.approx(1 / two_threads)


def train(cli: Cli, data: Path, output: Path, *flags: object) -> str:
    where = ("--data", data, "--output_dir", output, "--num_folds", 3, "--fold", 0)
    ended = cli("train", *TINY, *where, *flags)
    assert ended.code == 0, ended.err
    return ended.out


def test_the_environment_is_respected(
    small_dataset: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(threads, "DEFAULT_THREADS", 1)
    assert "fold 0: 1 thread (OMP_NUM_THREADS)" in train(
        cli, small_dataset, tmp_path, "--epochs", 1
    )


def test_without_a_wish_it_is_measured_and_recorded(
    small_dataset: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "thread_counts", lambda: [1, 2])
    shown = train(cli, small_dataset, tmp_path, "--epochs", 1)
    assert "1 thread: " in shown
    assert "2 threads: " in shown
    fold = tmp_path / "tiny" / "fold_0"
    used = load_checkpoint(fold / "last.pth")["num_threads"]
    assert json.loads((fold / "best_model.pth.json").read_text())["num_threads"] == used


def test_a_resumed_run_keeps_its_number(
    small_dataset: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    train(cli, small_dataset, tmp_path, "--epochs", 1, "--num_threads", 2)
    fold = tmp_path / "tiny" / "fold_0"
    (fold / "oof.parquet").unlink()
    saved = load_checkpoint(fold / "last.pth")
    torch.save({**saved, "epoch": 0, "step": 0}, fold / "last.pth")
    shown = train(cli, small_dataset, tmp_path, "--epochs", 1, "--resume")
    assert "fold 0: 2 threads (as before it was stopped)" in shown
