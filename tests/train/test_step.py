from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from isic.runtime.errors import UserError
from tests.support.commands import tiny_settings
from tests.support.datasets import small_table
from tests.support.training import CPU, peak_rates, random_batch
from train.augmentation.device import create_device_augmentation
from train.batch import Batch, split, to_device, with_aux
from train.loop import train_epoch
from train.mixup import create_mixup
from train.state import TrainState, create_state
from train.step import NonFiniteGradient, accumulate, optimizer_step


def test_accumulated_batches_give_the_gradient_of_one() -> None:
    """Four micro-batches of 4 and one batch of 16 lead to the same weights."""
    weights = []
    for num_batches in (1, 4):
        settings = tiny_settings(accumulation_steps=num_batches)
        state = create_state(settings, CPU, 0)
        batches = split(random_batch(16), num_batches)
        train_epoch(state, state.model, batches, peak_rates(1), settings, CPU, "")
        weights.append(torch.cat([p.detach().ravel() for p in state.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=2e-5, rtol=1e-3)


TARGETS = torch.tensor([[1, 0], [0, torch.nan], [torch.nan, torch.nan], [1, 1.0]]).repeat(4, 1)
"""Auxiliary targets of 16 rows, some of them absent."""


def test_parts_and_batches_give_the_gradient_of_auxiliary_targets_of_one() -> None:
    """Also if the parts differ in the number of targets."""
    weights = []
    for num_batches, limit in ((1, 16), (4, 16), (1, 5)):
        settings = tiny_settings(accumulation_steps=num_batches, aux="a: x; b: y", aux_weight=3)
        state = create_state(settings, CPU, 0)
        before = state.model.aux_head[-1].weight.detach().clone()
        forward = OutOfMemory(state.model, limit)
        batches = split(random_batch(16), num_batches)
        train_epoch(state, forward, batches, peak_rates(1), settings, CPU, "", TARGETS)
        assert not torch.equal(before, state.model.aux_head[-1].weight)
        weights.append(torch.cat([p.detach().ravel() for p in state.model.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(weights[0], other, atol=2e-5, rtol=1e-3)


def test_rows_without_targets_train_as_without_the_head() -> None:
    weights = []
    for aux, targets in (("", None), ("a: x; b: y", torch.full((16, 2), torch.nan))):
        settings = tiny_settings(aux=aux, ema_decay=0.9, clip_grad=1e9)
        state = create_state(settings, CPU, 0)
        batches = [random_batch(16)]
        train_epoch(state, state.model, batches, peak_rates(1), settings, CPU, "", targets)
        weights.append(torch.cat([p.detach().ravel() for p in state.model.backbone.parameters()]))
    assert torch.equal(*weights)


def equal_images(row: int, value: float = 1.0) -> Batch:
    """Return two equal images; the target NaN makes loss and gradient NaN."""
    return Batch(
        torch.zeros(2, 32, 32, 3, dtype=torch.uint8),
        torch.full((2,), value),
        torch.tensor([row, row + 1]),
    )


@pytest.mark.parametrize("num_after", [0, 5])
def test_a_gradient_that_is_not_finite_stops_before_the_step(num_after: int) -> None:
    """However many steps are queued when the host learns of it."""
    settings = tiny_settings(clip_grad=1e9)
    good = [equal_images(0)]
    bad = [*good, equal_images(4, torch.nan), *[equal_images(8)] * num_after]
    expected = create_state(settings, CPU, 0)
    train_epoch(expected, expected.model, good, peak_rates(9), settings, CPU, "")
    state = create_state(settings, CPU, 0)
    with pytest.raises(NonFiniteGradient) as stopped:
        train_epoch(state, state.model, bad, peak_rates(9), settings, CPU, "")
    for one, two in zip(tensors(expected), tensors(state), strict=True):
        assert torch.equal(one, two)
    message = stopped.value.describe(small_table()["isic_id"])
    where = "at step 1, in epoch 1, on the images ISIC_0000004, ISIC_0000005"
    assert f"not finite {where}; lower --lr" in message


def tensors(state: TrainState) -> list[torch.Tensor]:
    """Return the weights and the optimizer's moments."""
    moments = [value for entry in state.optimizer.state.values() for value in entry.values()]
    return [*state.model.state_dict().values(), *moments]


def test_loss_scaling_skips_steps_that_overflow() -> None:
    settings = tiny_settings(fp16=True)
    state = create_state(settings, CPU, 0)
    batches = [equal_images(0), equal_images(2, torch.nan), equal_images(4)]
    stats = train_epoch(state, state.model, batches, peak_rates(3), settings, CPU, "")
    assert stats.skipped_steps == 1
    assert len(stats.losses) == state.step == 3
    assert stats.mean_loss() is not None
    assert state.scaler.get_scale() == 65536 / 2
    assert all(entry["step"] == 2 for entry in state.optimizer.state.values())
    assert all(weight.isfinite().all() for weight in state.model.parameters())
    with pytest.raises(NonFiniteGradient, match="not finite"):
        train_epoch(
            state, state.model, [equal_images(2, torch.nan)] * 40, peak_rates(50), settings, CPU, ""
        )


class HostSyncs(TorchDispatchMode):
    """Collects operations that return a value to the host, which would wait for a GPU."""

    SYNCING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.SYNCING:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_host_sync_is_noticed() -> None:
    with HostSyncs() as syncs:
        torch.ones(2).sum().item()
    assert len(syncs.names) == 1


@pytest.mark.parametrize(
    "values",
    [
        {"ema_decay": 0.9, "accumulation_steps": 2},
        {"fp16": True, "mask_weight": 1.0},
        {"bf16": True, "mixup": 0.4, "cutmix": 0.4},
        {"bf16": True, "loss": "bce", "label_smoothing": 0.1},
        {"fp16": True, "loss": "asl", "label_smoothing": 0.1},
        {"bf16": True, "model": "test_efficientnet", "drop_path_rate": 0.1},
        {"bf16": True, "augment_on": "device", "augmentation": "medium", "mixup": 0.4},
        {"fp16": True, "augment_on": "device", "augmentation": "medium", "mask_weight": 1.0},
        {"fp16": True, "aux": "a: x; b: y", "cutmix": 0.4},
    ],
)
def test_a_step_makes_no_host_sync(values: dict[str, object]) -> None:
    settings = tiny_settings(**values)
    state = create_state(settings, CPU, 0)
    augment = create_device_augmentation(settings.augmentation, settings.augment_on, CPU)
    mix = create_mixup(settings.mixup, settings.cutmix)
    with HostSyncs() as syncs:
        for _ in range(2):
            batch = augment(to_device(random_batch(8, masks=settings.mask_weight > 0), CPU))
            batches = [mix(with_aux(batch, TARGETS if settings.aux else None))]
            loss = accumulate(state, state.model, batches, settings, CPU)
            optimizer_step(state, settings.clip_grad, loss)
    assert syncs.names == []


class OutOfMemory(nn.Module):
    """Raises as a GPU does whose memory holds at most `limit` images."""

    def __init__(self, model: nn.Module, limit: int) -> None:
        super().__init__()
        self.model, self.limit, self.sizes = model, limit, list[int]()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(len(images))
        outputs: tuple[torch.Tensor, ...] = self.model(images)
        return outputs


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = []
    settings = tiny_settings(batch_size=16)
    batches = [random_batch(16)] * 2
    for limit in (16, 5):
        state = create_state(settings, CPU, 0)
        forward = OutOfMemory(state.model, limit)
        train_epoch(state, forward, batches, peak_rates(2), settings, CPU, "")
        weights.append(torch.cat([weight.detach().ravel() for weight in state.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=2e-5, rtol=1e-3)
    assert forward.sizes == [4] * 8
    assert state.step == 2
    assert "cpu is out of memory: continuing with 4 images at a time" in capsys.readouterr().out


def test_an_image_that_does_not_fit_memory_is_refused() -> None:
    state = create_state(tiny_settings(), CPU, 0)
    with pytest.raises(UserError, match="out of memory with 1 images at a time; lower"):
        accumulate(state, OutOfMemory(state.model, 0), [random_batch(4)], tiny_settings(), CPU)
