from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isic.layout import BEST_CHECKPOINT, LAST_CHECKPOINT
from isic.runtime.files import read_manifest
from tests.support.commands import TINY, Cli, tiny_settings
from train import threads
from train.checkpoint import load_checkpoint
from train.rows import load_data
from train.state import create_state, restore
from train.threads import measure, set_threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


class Machine:
    """A simulated machine, with seconds per image by number of threads, and its clock."""

    def __init__(self, seconds_per_image: dict[int, list[float]]) -> None:
        self.seconds_per_image, self.now, self.passes = seconds_per_image, 0.0, list[int]()

    def run(self, num_images: int) -> None:
        count = torch.get_num_threads()
        turns = self.seconds_per_image[count]
        self.now += num_images * turns[self.passes.count(count) % len(turns)]
        self.passes.append(count)

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "fastest", "most_passes"),
    [
        ({1: [0.004], 2: [0.0025]}, 2, 16),
        ({1: [0.004], 2: [0.0025, 0.0025, 0.02]}, 1, 16),
        ({1: [0.004], 2: [0.15]}, 1, 8),
        ({1: [0.004], 4: [0.002], 8: [0.0015]}, 8, 22),
        ({1: [3.0], 2: [1.6]}, 2, 4),
    ],
    ids=["idle", "sometimes busy", "busy", "many cores", "a large network"],
)
def test_the_fastest_number_of_threads_is_found(
    seconds: dict[int, list[float]], fastest: int, most_passes: int
) -> None:
    machine = Machine(seconds)
    rates = measure(machine.run, 32, sorted(seconds), machine.clock)
    assert max(rates, key=lambda count: rates[count]) == fastest
    assert len(machine.passes) <= most_passes
    assert rates[1] == pytest.approx(1 / seconds[1][0])


def test_the_measurement_changes_neither_model_nor_random_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "num_cores", lambda: 2)
    settings = tiny_settings(
        model="test_efficientnet", batch_size=4, drop_rate=0.5, mask_weight=1.0
    )
    model = create_state(settings, CPU, 0).model
    model.backbone.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    words = set_threads(model, settings, CPU, None)
    assert torch.get_num_threads() in (1, 2)
    assert "1 thread: " in words
    assert "2 threads: " in words
    assert "img/s" in words
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(weight.grad is None for weight in model.parameters())
    assert model.training


def test_settings_come_before_the_stopped_run_and_that_before_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = create_state(tiny_settings(), CPU, 0).model
    assert set_threads(model, tiny_settings(num_threads=3), CPU, 2) == "3 threads (--num_threads)"
    assert torch.get_num_threads() == 3
    assert set_threads(model, tiny_settings(), CPU, 2) == "2 threads (as before it was stopped)"
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(threads, "DEFAULT_THREADS", 1)
    assert set_threads(model, tiny_settings(), CPU, None) == "1 thread (OMP_NUM_THREADS)"
    assert torch.get_num_threads() == 1
    assert set_threads(model, tiny_settings(), torch.device("cuda"), 2) == ""
    assert torch.get_num_threads() == 1, "a GPU's steps do not depend on it"


def test_several_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sets OMP_NUM_THREADS to 1 if it is not set: not a choice of the user."""
    monkeypatch.setattr(threads, "num_cores", lambda: 16)
    monkeypatch.setattr(threads, "DEFAULT_THREADS", 8)
    assert threads.thread_counts() == [1, 8, 16]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(threads, "DEFAULT_THREADS", 1)
    assert threads.thread_counts() == [1, 4]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads._known_number(None, CPU, None) == (None, "")
    monkeypatch.setattr(threads, "DEFAULT_THREADS", 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads._known_number(None, CPU, None) == (2, "OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "num_cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads._known_number(None, CPU, None) == (1, "one core per process")


def test_a_resumed_run_keeps_its_number_of_threads(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ["--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    ended = cli("train", *TINY, *flags, "--num_threads", 2)
    assert ended.code == 0
    assert "fold 0: 2 threads (--num_threads)" in ended.out
    fold = tmp_path / "tiny" / "fold_0"
    assert load_checkpoint(fold / LAST_CHECKPOINT)["num_threads"] == 2
    assert read_manifest(fold / BEST_CHECKPOINT)["num_threads"] == 2
    settings = tiny_settings(
        data=small_dataset, output_dir=tmp_path, epochs=1, name="tiny", resume=True
    )
    state = create_state(settings, CPU, 0)
    restore(state, fold / LAST_CHECKPOINT, settings, load_data(settings))
    assert state.num_threads == 2
