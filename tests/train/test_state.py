import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from isic.layout import LAST_CHECKPOINT
from isic.runtime.errors import UserError
from tests.support.commands import ROOT, tiny_settings
from tests.support.training import CPU, other_constants, peak_rates, random_batch
from train.loop import train_epoch
from train.optim import BACKBONE, HEAD, learning_rates, set_lr
from train.rows import load_data
from train.state import TrainState, create_state, restore, save_last


def test_a_restored_state_continues_to_the_same_bits(small_dataset: Path, tmp_path: Path) -> None:
    """With batch statistics, channels-last weights and a loss scale that was lowered."""
    settings = tiny_settings(
        model="test_efficientnet",
        data=small_dataset,
        output_dir=tmp_path,
        fp16=True,
        ema_decay=0.9,
        accumulation_steps=2,
    )
    data = load_data(settings)

    def learn(state: TrainState, num_batches: int, target: float = 1.0) -> None:
        batches = [random_batch(8)._replace(target=torch.full((8,), target))] * num_batches
        torch.manual_seed(state.step)
        train_epoch(state, state.model, batches, peak_rates(99), settings, CPU, "")

    state = create_state(settings, CPU, 0)
    restored = create_state(settings, CPU, 1)
    learn(state, 3)
    learn(state, 1, target=torch.nan)
    save_last(tmp_path / LAST_CHECKPOINT, state, settings, data)
    restore(restored, tmp_path / LAST_CHECKPOINT, settings, data)
    ends = []
    for each in (state, restored):
        learn(each, 5)
        moments = [value for entry in each.optimizer.state.values() for value in entry.values()]
        ends.append(
            [*each.model.state_dict().values(), *each.evaluated.state_dict().values(), *moments]
        )
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))
    assert state.scaler.state_dict() == restored.scaler.state_dict()
    assert state.scaler.get_scale() == 65536 / 2


def test_a_last_checkpoint_of_an_earlier_version_resumes(
    small_dataset: Path, tmp_path: Path
) -> None:
    """Its parameter groups have neither name nor part of the network."""
    settings = tiny_settings(data=small_dataset, output_dir=tmp_path)
    state = create_state(settings, CPU, 0)
    data = load_data(settings)
    for group in state.optimizer.param_groups:
        del group["part"], group["name"]
    save_last(tmp_path / LAST_CHECKPOINT, state, settings, data)
    restored = create_state(settings, CPU, 0)
    restore(restored, tmp_path / LAST_CHECKPOINT, settings, data)
    set_lr(restored.optimizer, peak_rates(1), 0)
    assert learning_rates(restored.optimizer) == {BACKBONE: 1e-4, HEAD: 1e-3}


def test_another_number_of_processes_is_refused(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch would have another number of steps, which the saved one would not fit."""
    settings = tiny_settings(data=small_dataset, output_dir=tmp_path)
    data = load_data(settings)
    state = create_state(settings, CPU, 0)
    path = tmp_path / LAST_CHECKPOINT
    for then, now in ((2, 1), (1, 2)):
        state.epoch = 0
        monkeypatch.setattr("train.distributed.world_size", lambda number=then: number)
        save_last(path, state, settings, data)
        monkeypatch.setattr("train.distributed.world_size", lambda number=now: number)
        restore(state, path, settings, data)  # nothing has been trained yet
        state.epoch = 1
        monkeypatch.setattr("train.distributed.world_size", lambda number=then: number)
        save_last(path, state, settings, data)
        restore(state, path, settings, data)
        monkeypatch.setattr("train.distributed.world_size", lambda number=now: number)
        words = rf"last\.pth was {then}, now it is {now}; start {then} again, .* with --force$"
        with pytest.raises(UserError, match=words):
            restore(state, path, settings, data)
    # Of an earlier version.
    saved = torch.load(path, weights_only=True)
    del saved["num_processes"]
    torch.save(saved, path)
    restore(state, path, settings, data)


def test_a_timm_with_another_mean_does_not_continue(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(data=small_dataset, output_dir=tmp_path)
    data = load_data(settings)
    path = tmp_path / LAST_CHECKPOINT
    save_last(path, create_state(settings, CPU, 0), settings, data)
    monkeypatch.setattr("train.model.pretrained_config", other_constants)
    state = create_state(settings, CPU, 0)
    words = r"last\.pth was trained with mean \(0\.5, .* timm has \(0\.1, .* with --force$"
    with pytest.raises(UserError, match=words):
        restore(state, path, settings, data)
    # Of an earlier version.
    saved = torch.load(path, weights_only=True)
    del saved["config"]["preprocess"]
    torch.save(saved, path)
    restore(state, path, settings, data)


@pytest.mark.slow
def test_a_convolution_that_corrupts_the_heap_is_avoided() -> None:
    """In its own process, which would end with a segmentation fault or an abort."""
    script = """
import torch
from train.config import TrainSettings
from train.batch import Batch
from train.loop import train_epoch
from train.state import create_state
settings = TrainSettings(
    model="mobileone_s0", pretrained=False, image_size=64, batch_size=2, precision="fp32"
)
cpu, rates = torch.device("cpu"), dict.fromkeys(("backbone", "head"), [0.1] * 4)
batch = Batch(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), torch.ones(2), torch.arange(2))
state = create_state(settings, cpu, 0)
train_epoch(state, state.model, [batch] * 4, rates, settings, cpu, "fold 0")
print("learnt")
"""
    strict = {**os.environ, "LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=strict,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "learnt\n", ended.stderr


@pytest.mark.parametrize("key", ["model_state_dict", "optimizer_state_dict"])
@pytest.mark.parametrize("value", [{}, {"state": {0: {"step": ["x"]}}, "param_groups": []}])
def test_a_last_checkpoint_with_a_damaged_state_is_refused(
    key: str, value: dict[str, Any], small_dataset: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(data=small_dataset, output_dir=tmp_path, precision="fp32")
    data = load_data(settings)
    state = create_state(settings, CPU, 0)
    path = tmp_path / LAST_CHECKPOINT
    save_last(path, state, settings, data)
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, key: value}, path)
    with pytest.raises(UserError, match=r"last\.pth is damaged \(.*; train this fold again"):
        restore(state, path, settings, data)
