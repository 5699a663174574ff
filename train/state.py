"""What learning goes on from, and its file `last.pth`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from isic.runtime.config import build
from isic.runtime.errors import UserError
from train import distributed
from train.checkpoint import load_checkpoint, save_checkpoint
from train.config import TrainSettings
from train.data import TrainData
from train.model import Classifier, create_model, takes_image_size
from train.optim import create_optimizer
from train.pretrained import Weights, find_weights

FREE_TO_CHANGE = {
    "fold",
    "force",
    "resume",
    "num_threads",
    "num_workers",
    "device",
    "data",
    "output_dir",
    "on_error",
}
"""Settings that may differ when a run is resumed: they do not change what is learnt."""


@dataclass
class TrainState:
    """Everything that learning goes on from; `last.pth` holds it between epochs."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    averaged: ModelEmaV3 | None
    weights: Weights
    """The weights that the backbone started from."""
    started_from: dict[str, Any]
    """Their source and digests."""
    stopped: Tensor
    """float32 scalar on the device: 1 from the first step on after which the run cannot go on, or 0."""
    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimizer steps finished."""
    best_pauc: float = 0.0
    num_parts: int = 1
    """Parts that a micro-batch is cut into because the GPU's memory does not hold it whole."""
    num_threads: int | None = None
    """Threads on a CPU before a run was stopped; None if this one starts or the file is of an earlier version."""

    @property
    def evaluated(self) -> Classifier:
        """The weights that are validated and saved: the moving average where there is one."""
        model: Classifier = self.averaged.module if self.averaged else self.model
        return model


def create_state(settings: TrainSettings, device: torch.device, fold: int) -> TrainState:
    """Builds model, optimizer, loss scaling and moving average; random weights depend on seed and fold alone."""
    torch.manual_seed(hash((settings.seed, fold)))
    weights = find_weights(settings.pretrained, fold)
    pretrained = str(weights.path) if weights.path else settings.pretrained
    model = create_model(settings, pretrained)
    started_from = weights.facts(model.backbone)
    model = model.to(device)
    if device.type == "cpu" and damages_heap(model):
        model.backbone.register_forward_pre_hook(_channels_first)
    elif not takes_image_size(settings.model):
        # convolutions of cuDNN and oneDNN are fast with it; model.to() fails on weights of other ranks
        convert_conv2d_weight_memory_format(model, torch.channels_last)
    averaged = (
        ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True) if settings.ema_decay else None
    )
    scaler = torch.amp.GradScaler(device.type, enabled=settings.fp16)
    stopped = torch.zeros((), device=device)
    return TrainState(
        model, create_optimizer(model, settings), scaler, averaged, weights, started_from, stopped
    )


def damages_heap(model: nn.Module) -> bool:
    """Whether a backward pass on a CPU with channels last damages the heap, as in MobileOne and FastViT.

    torch 2.14 with oneDNN: the strided 1x1 convolution of the pixels, as in `Conv2d(3, 48, 1, stride=2)`, ends in a
    segmentation fault or corrupts what others allocated. https://github.com/pytorch/pytorch/issues/136348 was of the
    same kind. Can be removed once that layer survives some backward passes on a channels-last input.
    """
    return any(
        layer.in_channels == 3 and layer.kernel_size == (1, 1) and layer.stride != (1, 1)
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
    )


def _channels_first(backbone: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.contiguous() for part in inputs)


def save_last(path: Path, state: TrainState, settings: TrainSettings, data: TrainData) -> None:
    """Writes all that resuming needs."""
    if not distributed.is_main():
        return
    save_checkpoint(
        path,
        model_state_dict=state.model.state_dict(),
        optimizer_state_dict=state.optimizer.state_dict(),
        scaler_state_dict=state.scaler.state_dict(),
        averaged_state_dict=state.averaged.state_dict() if state.averaged else None,
        best_pauc=state.best_pauc,
        epoch=state.epoch,
        step=state.step,
        config={"folds_digest": data.folds.digest, "pretrained": state.started_from},
        num_threads=torch.get_num_threads(),
        args=settings.model_dump(mode="json"),
    )


def restore(state: TrainState, path: Path, settings: TrainSettings, data: TrainData) -> None:
    """Puts the content of `last.pth` into `state`.

    Raises:
        UserError: it was made with other settings or other folds; the first difference is named.
    """
    saved = load_checkpoint(path)
    refuse_difference(path, saved["args"], settings)
    if saved["config"]["folds_digest"] != data.folds.digest:
        raise UserError(f"{path} was trained on other folds; train afresh with --force")
    if saved["config"].get("pretrained", state.started_from) != state.started_from:
        raise UserError(
            f"{path} started from other weights than {settings.pretrained} has now; give those "
            "weights again, or train afresh with --force"
        )
    state.model.load_state_dict(saved["model_state_dict"])
    parts = [group["part"] for group in state.optimizer.param_groups]
    state.optimizer.load_state_dict(saved["optimizer_state_dict"])
    for group, part in zip(state.optimizer.param_groups, parts, strict=True):
        group["part"] = part  # files of earlier versions lack it
    state.scaler.load_state_dict(saved["scaler_state_dict"])
    if state.averaged:
        state.averaged.load_state_dict(saved["averaged_state_dict"])
    state.num_threads = saved.get("num_threads")
    state.epoch, state.step, state.best_pauc = saved["epoch"], saved["step"], saved["best_pauc"]


def refuse_difference(path: Path, then: Mapping[str, Any], settings: TrainSettings) -> None:
    """Raises a UserError that names the first setting in which the run that wrote `path` differs from this one."""
    now = settings.model_dump(mode="json")
    then = build(TrainSettings, then, source=str(path)).model_dump(
        mode="json"
    )  # settings it does not know have defaults
    for key in sorted(now.keys() - FREE_TO_CHANGE):
        if now[key] != then[key]:
            raise UserError(
                f"{path} was made with {key}={then[key]}, now it is {now[key]}; go back to the former value, "
                "choose another --name, or train it again with --force"
            )
