"""The state of training, and its file `last.pth`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from isic.layout import Fold
from isic.preprocess import PreprocessSpec
from isic.runtime.errors import UserError
from train import distributed
from train.checkpoint import damaged_content, load_checkpoint, save_checkpoint
from train.config import TrainSettings
from train.model import Classifier, create_model
from train.optim import create_optimizer
from train.pretrained import Weights, find_weights
from train.resume import refuse_changed_files, refuse_difference
from train.rows import TrainData
from train.seeds import seed_weights
from train.timm_models import takes_image_size

NOT_VALIDATED = -1.0
"""`best_pauc` before the first validation on all held-out rows."""


@dataclass
class TrainState:
    """Everything that training changes; `last.pth` holds it between epochs."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    averaged: ModelEmaV3 | None
    """Exponential moving average of the weights."""
    weights: Weights
    """The weights that the backbone started from."""
    started_from: dict[str, Any]
    """Their source and digests."""
    diverged: Tensor
    """float32 scalar on the device: 1 from the first step after which the run cannot continue."""
    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimizer steps finished."""
    best_pauc: float = NOT_VALIDATED
    """pAUC on all held-out rows in the selected epoch; with `select_epoch=last`, in the latest
    epoch that was validated on all."""
    num_parts: int = 1
    """Parts that a micro-batch is cut into to fit the device's memory."""
    num_threads: int | None = None
    """CPU threads of the run that is resumed; None for a new run or a file without the number."""

    @property
    def evaluated(self) -> Classifier:
        """The model that is validated and saved: the moving average if there is one."""
        model: Classifier = self.averaged.module if self.averaged else self.model
        return model


def create_state(settings: TrainSettings, device: torch.device, fold: Fold) -> TrainState:
    """Build model, optimizer, loss scaling and moving average."""
    seed_weights(settings.seed, fold)
    weights = find_weights(settings.pretrained, fold)
    model = create_model(settings, str(weights.path) if weights.path else settings.pretrained)
    started_from = weights.manifest_fields(model.backbone)
    model = model.to(device)
    use_fast_memory_format(model, settings.model, device)
    averaged = None
    if settings.ema_decay:
        averaged = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True)
    optimizer = create_optimizer(
        model, settings.lr, settings.lr_backbone, settings.weight_decay, settings.layer_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    diverged = torch.zeros((), device=device)
    return TrainState(model, optimizer, scaler, averaged, weights, started_from, diverged)


def use_fast_memory_format(model: Classifier, name: str, device: torch.device) -> None:
    """Store convolutional weights channels-last, which cuDNN and oneDNN compute faster with."""
    if device.type == "cpu" and corrupts_heap(model):
        model.backbone.register_forward_pre_hook(_channels_first)
    elif not takes_image_size(name):
        # Not model.to(memory_format=...), which raises for 5-dimensional weights:
        # pytorch/pytorch#77821, seen with torch 2.14. Use it once they are left unchanged.
        convert_conv2d_weight_memory_format(model, torch.channels_last)


def corrupts_heap(model: nn.Module) -> bool:
    """Return whether a channels-last backward pass on a CPU would corrupt the heap."""
    # A strided 1x1 convolution of the pixels, as in MobileOne and FastViT, makes oneDNN write past
    # its workspace: uxlfoundation/oneDNN#6035, seen with torch 2.14. Remove it with the first torch
    # on a oneDNN that has the fix; a test runs such a network with glibc's malloc checks.
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    return any(
        layer.in_channels == 3 and layer.kernel_size == (1, 1) and layer.stride != (1, 1)
        for layer in convolutions
    )


def _channels_first(backbone: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.contiguous() for part in inputs)


def save_last(path: Path, state: TrainState, settings: TrainSettings, data: TrainData) -> None:
    """Write `last.pth`. Main process only."""
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
        config={
            "folds_digest": data.folds.digest,
            "preprocess": state.model.spec.model_dump(mode="json"),
            "pretrained": state.started_from,
        },
        num_threads=torch.get_num_threads(),
        num_processes=distributed.world_size(),
        metadata_digests=data.metadata_digests,
        images_digest=data.images_digest,
        args=settings.model_dump(mode="json"),
    )


def restore(state: TrainState, path: Path, settings: TrainSettings, data: TrainData) -> None:
    """Load `last.pth` into `state`.

    Raises:
        UserError: it was made with other settings, another number of processes, other folds,
            other training tables or images, other initial weights or another mean or std.
    """
    saved = load_checkpoint(path)
    config = saved["config"]
    refuse_difference(path, saved["args"], settings)
    if saved["epoch"]:
        _refuse_other_processes(path, saved.get("num_processes"))
    if config.get("folds_digest") != data.folds.digest:
        raise UserError(f"{path} was trained on other folds; start again with --force")
    refuse_changed_files(
        path, saved.get("metadata_digests"), data.metadata_paths, data.metadata_digests
    )
    if saved.get("images_digest") not in {None, data.images_digest}:
        raise UserError(
            f"the images have changed since {path} was trained; restore them, or start again with "
            "--force"
        )
    if config.get("pretrained", state.started_from) != state.started_from:
        raise UserError(
            f"{path} started from other weights than {settings.pretrained} has now; restore those "
            "weights, or start again with --force"
        )
    _refuse_other_constants(path, config.get("preprocess"), state.model.spec)
    with damaged_content(path):
        _load_state(state, saved)


def _refuse_other_processes(path: Path, then: int | None) -> None:
    """Raise a UserError if `path` was made with another number of processes than there are now.

    Args:
        then: None in files of earlier versions.
    """
    # An epoch has another number of steps then, and the saved step another learning rate.
    now = distributed.world_size()
    if then not in {None, now}:
        raise UserError(
            f"the number of processes that made {path} was {then}, now it is {now}; start {then} "
            "again, or train this fold again with --force"
        )


def _refuse_other_constants(
    path: Path, saved: Mapping[str, Any] | None, now: PreprocessSpec
) -> None:
    """Raise a UserError if `path` was made with another mean or std than the model has now.

    Args:
        saved: its preprocessing; None in files of earlier versions.
    """
    if saved is None:
        return
    with damaged_content(path):
        then = PreprocessSpec(**saved)
    if then != now:
        raise UserError(
            f"{path} was trained with mean {then.mean} and std {then.std}, and the installed timm "
            f"has {now.mean} and {now.std}; install the timm that it was trained with, or start "
            "again with --force"
        )


def _load_state(state: TrainState, saved: dict[str, Any]) -> None:
    state.model.load_state_dict(saved["model_state_dict"])
    # Files of earlier versions have no `part` or `name` in their groups, so these are kept.
    labels = [(group["part"], group["name"]) for group in state.optimizer.param_groups]
    state.optimizer.load_state_dict(saved["optimizer_state_dict"])
    for group, (part, name) in zip(state.optimizer.param_groups, labels, strict=True):
        group.update(part=part, name=name)
    state.scaler.load_state_dict(saved["scaler_state_dict"])
    if state.averaged:
        state.averaged.load_state_dict(saved["averaged_state_dict"])
    state.num_threads = saved.get("num_threads")
    state.epoch = saved["epoch"]
    state.step = saved["step"]
    state.best_pauc = saved["best_pauc"]
