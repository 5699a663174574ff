"""Parameter groups with their own learning rates, and the schedule of each as an array."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from train.config import TrainSettings
from train.model import Classifier

BACKBONE, HEAD = "backbone", "head"
"""Parts of the network that have a learning rate of their own; the mask decoder counts as head."""

Schedule = Mapping[str, NDArray[np.float64]]
"""Factor of the peak learning rate at each optimizer step, [num_steps], by part."""


def create_optimizer(model: Classifier, settings: TrainSettings) -> torch.optim.AdamW:
    """Returns AdamW over backbone and heads with their learning rates; vectors (biases, norms) are not decayed.

    Each parameter group names its `part` of the network, BACKBONE or HEAD, and its `peak_lr`.
    """
    groups = [
        {**group, "part": BACKBONE, "peak_lr": settings.lr_backbone * group.get("lr_scale", 1.0)}
        for group in _backbone_groups(model.backbone, settings)
    ]
    for head in model.heads:
        groups += [
            {**group, "part": HEAD, "peak_lr": settings.lr}
            for group in param_groups_weight_decay(head, settings.weight_decay)
        ]
    for group in groups:
        group["lr"] = group["peak_lr"]
    return torch.optim.AdamW(
        groups, fused=True
    )  # the only kind that can leave a step out without asking the device


def _backbone_groups(backbone: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    no_decay: set[str] = getattr(backbone, "no_weight_decay", set)()
    if settings.layer_decay == 1:
        return list(
            param_groups_weight_decay(
                backbone, settings.weight_decay, no_weight_decay_list=no_decay
            )
        )
    groups = param_groups_layer_decay(
        backbone,
        settings.weight_decay,
        no_weight_decay_list=no_decay,
        layer_decay=settings.layer_decay,
    )
    return [
        {key: value for key, value in group.items() if key != "param_names"} for group in groups
    ]


def create_schedule(settings: TrainSettings, steps_per_epoch: int) -> Schedule:
    """Returns the learning-rate factors of a run; the backbone warms up when it begins to learn."""
    num_steps = steps_per_epoch * settings.epochs
    num_warmup = round(steps_per_epoch * settings.warmup_epochs)
    first_steps = {HEAD: 0, BACKBONE: steps_per_epoch * settings.freeze_epochs}
    return {
        part: lr_schedule(num_steps, num_warmup, first_step)
        for part, first_step in first_steps.items()
    }


def lr_schedule(num_steps: int, num_warmup: int, first_step: int = 0) -> NDArray[np.float64]:
    """Returns the factor of the peak learning rate at each optimizer step, float64 [num_steps].

    The factor is a cosine that falls from 1 after the first `num_warmup` steps to 0 at the end, times a linear ramp
    over `num_warmup` steps from `first_step`, before which it is 0: weights that join later have no Adam moments yet.
    """
    step = np.arange(num_steps)
    ramp = np.clip((step - first_step + 1) / max(num_warmup, 1), 0, 1)
    progress = (step - num_warmup) / max(num_steps - num_warmup, 1)
    cosine = 0.5 * (1 + np.cos(np.pi * np.clip(progress, 0, 1)))
    return ramp * cosine


def set_lr(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    """Sets the learning rate of every group to its part's factor of its peak."""
    for group in optimizer.param_groups:
        # numpy numbers do not load with weights_only
        group["lr"] = group["peak_lr"] * float(schedule[group["part"]][step])


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Returns the largest learning rate of each part's groups, as the last step used it."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        rates[group["part"]] = max(rates.get(group["part"], 0.0), group["lr"])
    return rates
