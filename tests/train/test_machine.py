from types import SimpleNamespace

import pytest
import torch

from tests.support.training import CPU
from train import machine
from train.machine import default_workers


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
