"""Parameter groups with their own learning rates, and the schedule of each as an array."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from train.model import Classifier

BACKBONE = "backbone"
HEAD = "head"
"""Parts of the network with their own learning rate; the mask decoder counts as head."""

Schedule = Mapping[str, NDArray[np.float64]]
"""Factor of the peak learning rate at each optimizer step, [num_steps], by part."""


def create_optimizer(
    model: Classifier, lr: float, lr_backbone: float, weight_decay: float, layer_decay: float
) -> torch.optim.AdamW:
    """Create AdamW over backbone and heads; vectors (biases, norms) are not decayed.

    Each parameter group has its `part` of the network, BACKBONE or HEAD, its `peak_lr`, and a
    `name` that groups of one learning rate share.

    Args:
        lr: peak learning rate of the heads.
        lr_backbone: peak learning rate of the backbone's last layers.
        layer_decay: factor of the backbone's learning rate from each layer to the one below it.
    """
    groups = []
    backbone = _backbone_groups(model.backbone, weight_decay, layer_decay)
    scales = sorted({group.get("lr_scale", 1.0) for group in backbone})
    for group in backbone:
        scale = group.get("lr_scale", 1.0)
        name = layer_name(scales.index(scale), len(scales))
        groups.append({**group, "part": BACKBONE, "name": name, "peak_lr": lr_backbone * scale})
    for head in model.heads:
        for group in param_groups_weight_decay(head, weight_decay):
            groups.append({**group, "part": HEAD, "name": HEAD, "peak_lr": lr})
    for group in groups:
        group["lr"] = group["peak_lr"]
    # Only the fused kernel honours found_inf on the device: skipping a step needs no host sync.
    return torch.optim.AdamW(groups, fused=True)


def layer_name(number: int, num_layers: int) -> str:
    """Return the name of the backbone's layer, counted from the input; that of the only one."""
    if num_layers == 1:
        return BACKBONE
    width = len(str(num_layers - 1))
    return f"{BACKBONE}_layer_{number:0{width}}"


def _backbone_groups(
    backbone: nn.Module, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    no_decay: set[str] = getattr(backbone, "no_weight_decay", set)()
    # Two groups instead of two per layer: the fused kernel runs once per group.
    if layer_decay == 1:
        return list(
            param_groups_weight_decay(backbone, weight_decay, no_weight_decay_list=no_decay)
        )
    groups = param_groups_layer_decay(
        backbone, weight_decay, no_weight_decay_list=no_decay, layer_decay=layer_decay
    )
    # Names are not needed, and would be saved with every checkpoint.
    return [{key: group[key] for key in group if key != "param_names"} for group in groups]


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make AdamW allocate the moments of all weights, 8 bytes each; nothing else changes.

    AdamW would do so in its first step, and for frozen weights in the first step after their thaw.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.found_inf = torch.ones((), device=weights[0].device)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def create_schedule(
    steps_per_epoch: int, epochs: int, warmup_epochs: float, freeze_epochs: int
) -> Schedule:
    """Return the learning-rate factors of a run; the backbone warms up when it is thawed."""
    num_steps = steps_per_epoch * epochs
    num_warmup = round(steps_per_epoch * warmup_epochs)
    thaw_step = steps_per_epoch * freeze_epochs
    return {
        HEAD: lr_schedule(num_steps, num_warmup),
        BACKBONE: lr_schedule(num_steps, num_warmup, thaw_step),
    }


def lr_schedule(num_steps: int, num_warmup: int, first_step: int = 0) -> NDArray[np.float64]:
    """Return the factor of the peak learning rate at each optimizer step, float64 [num_steps].

    The factor is a cosine from 1 after the first `num_warmup` steps to 0 at the end, times a linear
    ramp over `num_warmup` steps from `first_step`, before which it is 0.
    """
    step = np.arange(num_steps)
    # Weights that are thawed at `first_step` have no Adam moments yet: they get their own ramp.
    ramp = np.clip((step - first_step + 1) / max(num_warmup, 1), 0, 1)
    progress = (step - num_warmup) / max(num_steps - num_warmup, 1)
    cosine = 0.5 * (1 + np.cos(np.pi * np.clip(progress, 0, 1)))
    return ramp * cosine


def set_lr(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    """Set the learning rate of every group for a step."""
    for group in optimizer.param_groups:
        # float: a checkpoint with numpy numbers would not load with weights_only.
        group["lr"] = group["peak_lr"] * float(schedule[group["part"]][step])


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rates of the last step by name: of the backbone's layers, of the head."""
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    return dict(sorted(rates.items()))
