"""The network: uint8 pixels in, features and logits out."""

import contextlib
import copy
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from isic.preprocess import PreprocessSpec
from isic.runtime.errors import UserError, first_line
from train.config import TrainSettings
from train.mask_decoder import MASK_STRIDE, MaskDecoder
from train.timm_models import (
    LIBRARY_ERRORS,
    backbone_options,
    create_backbone,
    pretrained_config,
)

HARMLESS = {
    "global_pool": None,
    "drop_path_rate": 0.0,
    "grad_checkpointing": False,
    "batch_size": 2,
    "mask_weight": 0.0,
}
"""Settings that a backbone may not support, with a value that every backbone supports."""
REFUSALS = {
    "global_pool": "{model} does not pool by {global_pool}; choose another --global_pool or "
    "--model",
    "drop_path_rate": "{model} has no stochastic depth; set --drop_path_rate 0",
    "grad_checkpointing": "{model} cannot recompute activations; set --grad_checkpointing false",
    "batch_size": "{model} cannot be trained on one image of {image_size} px at a time; use a "
    "larger --batch_size",
    "image_size": "{model} does not {task} of {image_size} px ({reason}); --image_size {fits} "
    "fits, the size of its own config is {own_size}",
    "mask_weight": "{model} has no feature maps to predict masks from ({reason}); set "
    "--mask_weight 0",
    "model": "{model} does not run with these settings ({reason}); choose other settings or "
    "another --model",
}
"""Error message by the setting at fault."""
COMMON_STRIDES = (32, 14)
"""Backbones that accept many image sizes accept multiples of one of these."""


class Classifier(nn.Module):
    """A timm backbone and a linear head; it normalises its own input, so it takes raw pixels."""

    mean: Tensor
    inverse_std: Tensor
    spec: PreprocessSpec
    dtype = torch.float32
    """Type that the backbone computes in if its weights were cast; AMP casts by itself."""
    mask_stride: int | None = None
    """Input pixels per side of a mask's pixel; None if the network predicts no masks."""

    def __init__(
        self, backbone: nn.Module, spec: PreprocessSpec, drop_rate: float = 0.0, num_aux: int = 0
    ) -> None:
        """Add heads to a backbone.

        Args:
            drop_rate: dropout before the head.
            num_aux: K, number of auxiliary targets.
        """
        super().__init__()
        self.backbone = backbone
        self.spec = spec
        # Some backbones change the width once more between pooling and their classifier.
        width: Any = getattr(backbone, "head_hidden_size", None) or backbone.num_features
        self.num_features = int(width)
        self.head = nn.Sequential(nn.Dropout(drop_rate), nn.Linear(self.num_features, 1))
        self.num_aux = num_aux
        if num_aux:
            self.aux_head = nn.Sequential(
                nn.Dropout(drop_rate), nn.Linear(self.num_features, num_aux)
            )
        mean = 255 * torch.tensor(spec.mean)
        std = 255 * torch.tensor(spec.std)
        # Not persistent: a checkpoint stores the preprocessing in its config.
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("inverse_std", (1 / std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return features [N, D] (the backbone's output), logits [N, 1] and any auxiliary logits
        [N, K], float32.

        Args:
            images: uint8 [N, H, W, 3], RGB; float32 in [0, 255] after mixup or cutmix.
        """
        return self.forward_maps(self.normalised(images))

    def forward_maps(self, maps: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of normalised images [N, 3, H, W]."""
        features = self.backbone(maps).float()
        return features, *self.logits(features)

    def logits(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return the logits [N, 1], and any auxiliary ones [N, K], of features [N, D], float32."""
        # Under autocast too: in half precision many rows would share a logit and lose their order.
        with without_autocast(features.device.type):
            logits = [head(features) for head in self.linear_heads]
        return tuple(part.float() for part in logits)

    def normalised(self, images: Tensor) -> Tensor:
        """Return the backbone's input [N, 3, H, W]."""
        # Cast first: TensorRT accepts uint8 only as the input of a cast (NVIDIA/TensorRT#3985,
        # seen with TensorRT 10). The order may change once that is lifted.
        pixels = images.to(torch.float32).permute(0, 3, 1, 2)
        return ((pixels - self.mean) * self.inverse_std).to(self.dtype)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of the outputs in their order."""
        return ("features", "logits", "aux")[: 3 if self.num_aux else 2]

    @property
    def linear_heads(self) -> list[nn.Sequential]:
        """The heads that are linear in the features; they always compute in float32."""
        return [self.head, self.aux_head] if self.num_aux else [self.head]

    @property
    def heads(self) -> list[nn.Module]:
        """The modules that train at the head's learning rate: all but the backbone."""
        return [*self.linear_heads]


class MultiTask(Classifier):
    """A classifier that also predicts a mask of the lesion, from the same feature maps."""

    def __init__(
        self, backbone: nn.Module, spec: PreprocessSpec, drop_rate: float = 0.0, num_aux: int = 0
    ) -> None:
        super().__init__(backbone, spec, drop_rate, num_aux)
        infos: Any = backbone.feature_info
        deepest: dict[int, int] = {}
        for index, info in enumerate(infos):
            # Of several maps with one stride, the last has passed the most layers.
            deepest[info["reduction"]] = index
        strides = [stride for stride in deepest if stride >= MASK_STRIDE]
        self.map_indices = [deepest[stride] for stride in strides]
        channels = [infos[index]["num_chs"] for index in self.map_indices]
        self.decoder = MaskDecoder(channels, strides)
        self.mask_stride = self.decoder.stride

    def forward_maps(self, maps: Tensor) -> tuple[Tensor, ...]:
        """Return the classifier's outputs and the mask [N, H / stride, W / stride], float32.

        The mask is logits in training mode and probabilities in eval mode.
        """
        backbone: Any = self.backbone
        last, maps_by_stride = backbone.forward_intermediates(maps, indices=self.map_indices)
        features = backbone.forward_head(last).float()
        # Unlike the head, the decoder runs in half precision under autocast: its convolutions are
        # expensive, and masks are thresholded anyway.
        mask = self.decoder(maps_by_stride).float()
        # Training takes logits, because the loss of saturated probabilities has no gradient.
        return features, *self.logits(features), mask if self.training else mask.sigmoid()

    @property
    def output_names(self) -> tuple[str, ...]:
        return (*super().output_names, "mask")

    @property
    def heads(self) -> list[nn.Module]:
        return [*super().heads, self.decoder]


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast."""
    # A null context if autocast is off: torch.export would record a disabled one as a submodule,
    # which the ONNX exporter did not always support (pytorch/pytorch#136545).
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def preprocess_spec(settings: TrainSettings) -> PreprocessSpec:
    """Return the preprocessing of a config; mean and std are the backbone's own."""
    config = resolve_model_data_config(None, pretrained_cfg=pretrained_config(settings.model))
    return PreprocessSpec(
        size=settings.image_size,
        interpolation=settings.interpolation,
        mean=config["mean"],
        std=config["std"],
    )


def create_model(
    settings: TrainSettings,
    pretrained: bool | str | None = None,
    spec: PreprocessSpec | None = None,
) -> Classifier:
    """Build the network of a config and check it with one image.

    Args:
        pretrained: overrides the settings' value: False if the weights of a checkpoint follow.
        spec: the preprocessing that a checkpoint was trained with, which the installed timm may
            not have; `preprocess_spec` if not given.

    Raises:
        UserError: no such model, a setting does not fit it, or its weights cannot be loaded.
    """
    pretrained = settings.pretrained if pretrained is None else pretrained
    try:
        return _create_checked(settings, pretrained, spec)
    except UserError:
        raise
    except LIBRARY_ERRORS as error:
        raise UserError(_explain(settings, first_line(error).rstrip("."))) from error


def _create_checked(
    settings: TrainSettings, pretrained: bool | str, spec: PreprocessSpec | None = None
) -> Classifier:
    """Build the network.

    Raises:
        UserError: no such model, or its weights cannot be loaded.
        LIBRARY_ERRORS: timm's backbone and the settings do not fit.
    """
    backbone = create_backbone(settings.model, pretrained, backbone_options(settings))
    if settings.grad_checkpointing:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    network = MultiTask if settings.mask_weight else Classifier
    spec = spec or preprocess_spec(settings)
    model = network(backbone, spec, settings.drop_rate, len(settings.aux))
    _check_outputs(model, settings.image_size)
    if settings.batch_size == 1:
        # Raises for a network with batch statistics of a single value.
        copy.deepcopy(model).train()(_blank_image(settings.image_size))
    return model


@torch.no_grad()
def _check_outputs(model: Classifier, size: int) -> None:
    """Raise a ValueError if an output for one image has an unexpected shape."""
    outputs = model.eval()(_blank_image(size))
    model.train()
    expected: list[tuple[int, ...]] = [(1, model.num_features), (1, 1)]
    if model.num_aux:
        expected.append((1, model.num_aux))
    if model.mask_stride:
        expected.append((1, size // model.mask_stride, size // model.mask_stride))
    shapes = [tuple(output.shape) for output in outputs]
    if shapes != expected:
        raise ValueError(f"the shapes of its outputs are {shapes}, not {expected}")


def _blank_image(size: int) -> Tensor:
    return torch.zeros((1, size, size, 3), dtype=torch.uint8)


def _explain(settings: TrainSettings, reason: str) -> str:
    """Return the error message for a network that cannot be built or run."""
    # It blames the first setting that makes the network work when changed, because libraries
    # report one cause in many ways.
    own_size = pretrained_config(settings.model)["input_size"][-1]
    task = "predict masks of images" if settings.mask_weight else "take images"
    blamed, fits = _find_remedy(settings, own_size)
    return REFUSALS[blamed].format(
        **dict(settings), reason=reason, task=task, fits=fits, own_size=own_size
    )


def _find_remedy(settings: TrainSettings, own_size: int) -> tuple[str, Any]:
    """Return the first setting and value with which the network works, or ("model", None)."""
    sizes = [max(round(settings.image_size / stride), 1) * stride for stride in COMMON_STRIDES]
    remedies = [(name, value) for name, value in HARMLESS.items() if name != "mask_weight"]
    remedies += [("image_size", size) for size in (*sizes, own_size)]
    # Last, because it gives up a task.
    remedies += [("mask_weight", HARMLESS["mask_weight"])]
    for name, value in remedies:
        changed = settings.model_copy(update={name: value})
        if getattr(settings, name) != value and _runs(changed):
            return name, value
    return "model", None


def _runs(settings: TrainSettings) -> bool:
    try:
        _create_checked(settings, pretrained=False)
    except LIBRARY_ERRORS:
        return False
    return True
