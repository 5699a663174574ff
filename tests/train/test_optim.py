from typing import Any

import numpy as np
import pytest
import torch

from isic.runtime.config import CONFIG_DIR
from tests.support.commands import tiny_settings
from tests.support.training import CPU, peak_rates, random_batch
from train.config import TrainSettings, load_settings
from train.loop import train_epoch
from train.model import create_model
from train.optim import (
    BACKBONE,
    HEAD,
    allocate_moments,
    create_optimizer,
    create_schedule,
    layer_name,
    lr_schedule,
)
from train.state import TrainState, create_state

PRETRAINED_CONFIGS = {path.stem for path in CONFIG_DIR.glob("*.yaml")} - {
    "demo",
    "multitask_demo",
    "scratch",
}


def test_head_and_backbone_have_their_own_rates_and_vectors_are_not_decayed() -> None:
    model = create_model(tiny_settings())
    optimizer = create_optimizer(model, lr=1e-2, lr_backbone=1e-4, weight_decay=0.1, layer_decay=1)
    groups = optimizer.param_groups
    head = {id(p) for p in model.head.parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert group["lr"] == (1e-2 if id(parameter) in head else 1e-4)
            assert group["weight_decay"] == 0 or parameter.ndim > 1
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_layer_decay_falls_towards_the_input_and_leaves_the_head_alone() -> None:
    model = create_model(tiny_settings())
    optimizer = create_optimizer(
        model, lr=1e-2, lr_backbone=1e-3, weight_decay=0.05, layer_decay=0.5
    )
    rate = {}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            rate[id(weight)] = group["lr"]
    backbone: Any = model.backbone
    blocks = [rate[id(block.mlp.fc1.weight)] for block in backbone.blocks]
    assert np.allclose(np.divide(blocks[1:], blocks[:-1]), 2)
    assert max(blocks) <= 1e-3
    assert {rate[id(weight)] for weight in model.head.parameters()} == {1e-2}
    assert rate.keys() == {id(weight) for weight in model.parameters()}


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    factor = lr_schedule(100, 10)
    assert factor[0] == 0.1
    assert factor[9] == factor[10] == 1.0
    assert (np.diff(factor[10:]) < 0).all()
    assert factor[-1] < 0.001


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        *((name, {}) for name in sorted(PRETRAINED_CONFIGS)),
        ("vit_tiny", {"freeze_epochs": 3}),
        ("vit_tiny", {"freeze_epochs": 0}),
        ("vit_tiny", {"warmup_epochs": 2.5}),
    ],
)
def test_the_backbone_warms_up_when_it_is_thawed(name: str, flags: dict[str, float]) -> None:
    """The head's rates are those of a schedule without freezing, to the bit."""
    settings = load_settings(TrainSettings, {"config": name, **flags})
    per_epoch = 80
    thaw = settings.freeze_epochs * per_epoch
    warmup = round(settings.warmup_epochs * per_epoch)
    schedule = create_schedule(
        per_epoch, settings.epochs, settings.warmup_epochs, settings.freeze_epochs
    )
    head, backbone = schedule[HEAD], schedule[BACKBONE]
    step = np.arange(per_epoch * settings.epochs)
    cosine = 0.5 * (1 + np.cos(np.pi * ((step - warmup).clip(0) / (len(step) - warmup))))
    assert np.array_equal(head, np.where(step < warmup, (step + 1) / warmup, cosine))
    assert (backbone[:thaw] == 0).all()
    first = backbone[thaw : thaw + 3]
    np.testing.assert_allclose(first, np.arange(1, 4) / warmup * cosine[thaw : thaw + 3])
    assert first[0] < 0.03
    assert np.array_equal(backbone[thaw + warmup :], head[thaw + warmup :])


def test_without_warm_up_the_rates_start_at_their_peak() -> None:
    schedule = create_schedule(10, epochs=4, warmup_epochs=0, freeze_epochs=1)
    assert schedule[HEAD][0] == 1
    assert (schedule[BACKBONE][:10] == 0).all()
    assert np.array_equal(schedule[BACKBONE][10:], schedule[HEAD][10:])


def test_layers_have_names_that_sort() -> None:
    assert layer_name(0, 1) == "backbone"
    assert [layer_name(number, 10) for number in (0, 9)] == ["backbone_layer_0", "backbone_layer_9"]
    assert [layer_name(number, 14) for number in (2, 13)] == [
        "backbone_layer_02",
        "backbone_layer_13",
    ]


@pytest.mark.parametrize("values", [{}, {"fp16": True}, {"layer_decay": 0.8}])
def test_moments_allocated_in_advance_change_no_bit(values: dict[str, object]) -> None:
    """Before the first step, with a frozen backbone, and after some steps, as in a resumed run."""
    settings = tiny_settings(**values)
    states = [create_state(settings, CPU, 0) for _ in range(2)]
    first = states[0]
    first.model.backbone.requires_grad_(False)
    allocate_moments(first.optimizer)
    weights = {weight for group in first.optimizer.param_groups for weight in group["params"]}
    assert first.optimizer.state.keys() == weights
    assert not any(tensor.any() for tensor in moments(first)), "no step was made"
    assert all(weight.grad is None for weight in weights)
    first.model.backbone.requires_grad_(True)
    for _ in range(2):
        for state in states:
            train_epoch(state, state.model, [random_batch(8)], peak_rates(9), settings, CPU, "")
        allocate_moments(first.optimizer)
    tensors = [[*state.model.state_dict().values(), *moments(state)] for state in states]
    assert all(torch.equal(one, two) for one, two in zip(*tensors, strict=True))


def moments(state: TrainState) -> list[torch.Tensor]:
    """Return the optimizer's numbers of steps and moments, in the order of the weights."""
    groups = state.optimizer.param_groups
    weights = [weight for group in groups for weight in group["params"]]
    return [value for weight in weights for value in state.optimizer.state[weight].values()]
