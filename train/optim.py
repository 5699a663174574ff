"""Parameter groups with their own learning rates, and the schedule as an array."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim import param_groups_weight_decay

from train.config import TrainSettings
from train.model import Classifier


def create_optimizer(model: Classifier, settings: TrainSettings, device: torch.device) -> torch.optim.AdamW:
    """Returns AdamW over backbone and head with their learning rates; vectors (biases, norms) are not decayed."""
    no_decay: set[str] = getattr(model.backbone, "no_weight_decay", set)()
    groups: list[dict[str, Any]] = []
    for module, lr, skip in ((model.backbone, settings.lr_backbone, no_decay), (model.head, settings.lr, set())):
        for group in param_groups_weight_decay(module, settings.weight_decay, no_weight_decay_list=skip):
            groups.append({**group, "lr": lr, "peak_lr": lr})
    return torch.optim.AdamW(groups, fused=device.type in {"cuda", "cpu"})


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
        group["lr"] = group["peak_lr"] * float(factor)  # numpy numbers do not load with weights_only
