"""Parameter groups with their own learning rates, and the schedule as an array."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from train.config import TrainSettings
from train.model import Classifier


def create_optimizer(model: Classifier, settings: TrainSettings) -> torch.optim.AdamW:
    """Returns AdamW over backbone and heads with their learning rates; vectors (biases, norms) are not decayed."""
    groups = [
        {**group, "peak_lr": settings.lr_backbone * group.get("lr_scale", 1.0)}
        for group in _backbone_groups(model.backbone, settings)
    ]
    for head in model.heads:
        groups += [
            {**group, "peak_lr": settings.lr}
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


def lr_schedule(num_steps: int, num_warmup: int) -> NDArray[np.float64]:
    """Returns the factor of the peak learning rate at each optimizer step, [num_steps]: linear up, cosine to zero."""
    step = np.arange(num_steps)
    warmup = (step + 1) / max(num_warmup, 1)
    progress = (step - num_warmup) / max(num_steps - num_warmup, 1)
    cosine = 0.5 * (1 + np.cos(np.pi * np.clip(progress, 0, 1)))
    return np.where(step < num_warmup, warmup, cosine)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's learning rate to a factor of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * float(
            factor
        )  # numpy numbers do not load with weights_only
