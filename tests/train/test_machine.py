from types import SimpleNamespace

import pytest
import torch

from tests.support.commands import TINY_KEYS
from tests.support.training import CPU
from train import machine
from train.config import TrainSettings
from train.machine import best_precision, default_workers, resolve_choices


def test_a_gpu_gets_the_cores_and_its_processes_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_workers(CPU) == 0
    cores = default_workers(torch.device("cuda"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_workers(torch.device("cuda")) == max(1, cores // 2)


def test_workers_fit_into_shared_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fitting(megabytes: int, *, held: int = 2, processes: int = 1) -> tuple[int, int]:
        usage = SimpleNamespace(free=megabytes * 2**20)
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        return machine.fit_workers(8, 2**20 - machine.TENSOR_OVERHEAD, held)

    assert fitting(18) == (8, 2)
    assert capsys.readouterr().err == ""
    assert fitting(17) == (8, 1)
    assert fitting(6) == (4, 1)
    assert fitting(2) == (0, 1)
    assert fitting(18, held=12) == (6, 1)
    assert fitting(18, processes=2) == (7, 1)
    assert "MB for the batches of 8 workers; 7 are used" in capsys.readouterr().err
    assert machine.fit_workers(0, 2**40, 2)[0] == 0


@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        ((6, 1), "fp32"),
        ((7, 0), "fp16"),
        ((7, 5), "fp16"),
        ((8, 0), "bf16"),
        ((8, 9), "bf16"),
        ((9, 0), "bf16"),
        ((12, 0), "bf16"),
    ],
)
def test_the_generation_of_a_gpu_decides_its_precision(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert best_precision(gpu) == precision
    assert best_precision(CPU) == "fp32"
    settings = TrainSettings(**TINY_KEYS)
    assert resolve_choices(settings, gpu).precision == precision
    chosen = settings.model_copy(update={"precision": "fp32"})
    assert resolve_choices(chosen, gpu).precision == "fp32"


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({}, "device"),
        ({"augmentation": "medium"}, "device"),
        ({"augmentation": "heavy"}, "workers"),
        ({"augmentation": "none"}, "workers"),
        ({"augmentation": {"transform": {}}}, "workers"),
        ({"augment_on": "workers"}, "workers"),
    ],
)
def test_a_gpu_augments_what_it_can(
    values: dict[str, object], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    settings = TrainSettings(**TINY_KEYS, **values)
    assert resolve_choices(settings, torch.device("cuda", 0)).augment_on == place
    assert resolve_choices(settings, CPU).augment_on == "workers"
