"""The network: uint8 pixels in, features and a logit out."""

import contextlib
import copy
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from timm.layers import LayerNorm2d
from timm.models import get_deprecated_models
from torch import Tensor, nn

from isic.preprocess import PreprocessSpec
from isic.runtime.errors import UserError, did_you_mean
from train.config import TrainSettings
from train.pretrained import hub_id, local_file

MASK_STRIDE = 2
"""Masks are drawn at half the input's side: lesions of a few pixels lose their outline at a quarter of it."""
TRUNK_STRIDE = 4
"""Where feature maps are brought together that are all coarser; otherwise it is where the finest stands."""

LIBRARY_ERRORS = (
    RuntimeError,
    AssertionError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""Errors that timm and torch raise if a backbone and the settings do not fit."""

HARMLESS = {
    "global_pool": None,
    "drop_path_rate": 0.0,
    "grad_checkpointing": False,
    "batch_size": 2,
    "mask_weight": 0.0,
}
"""Settings that a backbone may not support, and values that each supports; `image_size` has no such value."""
REFUSALS = {
    "global_pool": "{model} does not pool by {global_pool}; choose another --global_pool",
    "drop_path_rate": "{model} has no stochastic depth; set --drop_path_rate 0",
    "grad_checkpointing": "{model} cannot recompute activations; set --grad_checkpointing false",
    "batch_size": "{model} cannot learn from one image of {image_size} px at a time; use a larger --batch_size",
    "image_size": "{model} does not {task} of {image_size} px ({reason}); --image_size {fits} fits, the size of its "
    "own config is {own_size}",
    "mask_weight": "{model} has no feature maps that masks can be drawn from ({reason}); set --mask_weight 0",
    "model": "{model} does not run with these settings ({reason}); choose other settings or another --model",
}
COMMON_STRIDES = (32, 14)
"""Backbones that take many sizes take multiples of one of these."""


class Classifier(nn.Module):
    """A timm backbone and a linear head. It normalises its own input, so the graph takes raw pixels."""

    mean: Tensor
    inverse_std: Tensor
    output_names: tuple[str, ...] = ("features", "logits")
    dtype = torch.float32
    """What the backbone computes in where its weights were cast; AMP casts by itself."""
    mask_stride: int | None = None
    """Input pixels a side of one pixel of the mask, None where the network draws none."""

    def __init__(self, backbone: nn.Module, spec: PreprocessSpec, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        # Some backbones go on to another width between pooling and the classifier.
        width: Any = getattr(backbone, "head_hidden_size", None) or backbone.num_features
        self.num_features = int(width)
        self.head = nn.Sequential(nn.Dropout(drop_rate), nn.Linear(self.num_features, 1))
        scale = 255 * torch.tensor(spec.std)
        self.register_buffer(
            "mean", (255 * torch.tensor(spec.mean)).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer("inverse_std", (1 / scale).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns features [N, D] (the backbone before the head) and logits [N, 1], float32.

        Args:
            images: uint8 [N, H, W, 3], RGB; mixed images come as floats in [0, 255].
        """
        features = self.backbone(self.normalised(images)).float()
        return features, self.logits(features)

    def logits(self, features: Tensor) -> Tensor:
        """Returns logits [N, 1] of features [N, D], in float32 under autocast too: their last digits order the rows."""
        with without_autocast(features.device.type):
            logits: Tensor = self.head(features)
        return logits.float()

    def normalised(self, images: Tensor) -> Tensor:
        """Returns the backbone's input [N, 3, H, W], normalised in float32."""
        # The cast stands before the transposition because TensorRT refuses to transpose uint8.
        pixels = images.to(torch.float32).permute(0, 3, 1, 2)
        return ((pixels - self.mean) * self.inverse_std).to(self.dtype)

    @property
    def heads(self) -> list[nn.Module]:
        """What learns at the head's rate: all but the backbone."""
        return [self.head]


class MultiTask(Classifier):
    """A classifier that also draws the lesion, from the same feature maps."""

    output_names = (*Classifier.output_names, "mask")

    def __init__(self, backbone: nn.Module, spec: PreprocessSpec, drop_rate: float = 0.0) -> None:
        super().__init__(backbone, spec, drop_rate)
        deepest: dict[int, int] = {}
        infos: Any = backbone.feature_info
        for index, info in enumerate(infos):
            deepest[info["reduction"]] = index
        strides = [stride for stride in deepest if stride >= MASK_STRIDE]
        self.map_indices = [deepest[stride] for stride in strides]
        self.decoder = MaskDecoder([infos[index]["num_chs"] for index in self.map_indices], strides)
        self.mask_stride = self.decoder.stride

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns features [N, D], logits [N, 1] and the mask [N, H / stride, W / stride], float32.

        The mask is logits while training, for a loss that does not saturate, and probabilities in eval mode. Under
        autocast the decoder computes in half precision: its convolutions cost much, and a mask is thresholded.
        """
        backbone: Any = self.backbone
        last, maps = backbone.forward_intermediates(
            self.normalised(images), indices=self.map_indices
        )
        features = backbone.forward_head(last).float()
        mask = self.decoder(maps).float()
        return features, self.logits(features), mask if self.training else mask.sigmoid()

    @property
    def heads(self) -> list[nn.Module]:
        return [self.head, self.decoder]


class MaskDecoder(nn.Module):
    """Feature maps of one or several strides to one map of mask logits.

    Each map is projected and unfolded to one stride, where they are summed. Unfolding (pixel shuffle) leaves no Resize
    in the exported graph, whose coefficients differ between runtimes.
    """

    def __init__(self, channels: list[int], strides: list[int], width: int = 32) -> None:
        super().__init__()
        finest = min(strides)
        trunk = next(
            stride for stride in (TRUNK_STRIDE, MASK_STRIDE, finest) if finest % stride == 0
        )
        self.stride = MASK_STRIDE if trunk % MASK_STRIDE == 0 else trunk
        self.projections = nn.ModuleList(
            nn.Sequential(
                LayerNorm2d(count),
                nn.Conv2d(count, width * (stride // trunk) ** 2, 1),
                nn.PixelShuffle(stride // trunk),
            )
            for count, stride in zip(channels, strides, strict=True)
        )
        finer = trunk // self.stride
        self.draw = nn.Sequential(
            LayerNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, finer**2, 3, padding=1),
            nn.PixelShuffle(finer),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Returns logits [N, h, w] of maps [N, C_i, h_i, w_i]."""
        drawn = [project(part) for project, part in zip(self.projections, maps, strict=True)]
        logits: Tensor = self.draw(torch.stack(drawn).sum(dim=0))
        return logits.squeeze(1)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Returns a context without autocast; one that leaves no trace in an exported graph, where autocast is off."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def preprocess_spec(settings: TrainSettings) -> PreprocessSpec:
    """Returns the preprocessing of a config: its size and resize method, the backbone's own mean and std."""
    config = resolve_model_data_config(None, pretrained_cfg=_backbone_config(settings.model))
    return PreprocessSpec(
        size=settings.image_size,
        interpolation=settings.interpolation,
        mean=config["mean"],
        std=config["std"],
    )


def create_model(settings: TrainSettings, pretrained: bool | str | None = None) -> Classifier:
    """Builds the network of a config and passes one image through it.

    Args:
        settings: model, image size and drop rates.
        pretrained: overrides the settings' (False when a checkpoint's weights follow).

    Raises:
        UserError: no such model, a setting does not fit it, or its weights cannot be had.
    """
    pretrained = settings.pretrained if pretrained is None else pretrained
    try:
        return _create_checked(settings, pretrained)
    except UserError:
        raise
    except LIBRARY_ERRORS as error:
        raise UserError(_explain(settings, _first_line(error))) from error


def _create_checked(settings: TrainSettings, pretrained: bool | str) -> Classifier:
    """Builds the network. Raises one of LIBRARY_ERRORS if timm's backbone and the settings do not fit."""
    backbone = _create_backbone(settings.model, pretrained, backbone_options(settings))
    if settings.grad_checkpointing:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    network = MultiTask if settings.mask_weight else Classifier
    model = network(backbone, preprocess_spec(settings), settings.drop_rate)
    _check_outputs(model, settings.image_size)
    if settings.batch_size == 1:  # batch statistics of a single value do not exist
        copy.deepcopy(model).train()(_blank_image(settings.image_size))
    return model


@torch.no_grad()
def _check_outputs(model: Classifier, size: int) -> None:
    """Passes one image through the network in eval mode. Raises ValueError if an output has an unexpected shape."""
    outputs = model.eval()(_blank_image(size))
    model.train()
    expected: list[tuple[int, ...]] = [(1, model.num_features), (1, 1)]
    if model.mask_stride:
        expected.append((1, size // model.mask_stride, size // model.mask_stride))
    shapes = [tuple(output.shape) for output in outputs]
    if shapes != expected:
        raise ValueError(f"the shapes of its outputs are {shapes}, not {expected}")


def _blank_image(size: int) -> Tensor:
    return torch.zeros((1, size, size, 3), dtype=torch.uint8)


def _explain(settings: TrainSettings, reason: str) -> str:
    """Returns the sentence on a network that cannot be built or run, for a library's reason.

    It blames the first setting without which the network works, or if there is none the library's reason alone.
    """
    own_size = _backbone_config(settings.model)["input_size"][-1]
    size = settings.image_size
    sizes = [max(round(size / stride), 1) * stride for stride in COMMON_STRIDES]
    *changes, without_masks = HARMLESS.items()
    changes += [("image_size", other) for other in (*sizes, own_size)]
    blamed, fits = next(
        (
            (name, value)
            for name, value in (*changes, without_masks)
            if getattr(settings, name) != value and _runs(settings.model_copy(update={name: value}))
        ),
        ("model", None),
    )
    task = "draw masks of images" if settings.mask_weight else "take images"
    return REFUSALS[blamed].format(
        **dict(settings), reason=reason, task=task, fits=fits, own_size=own_size
    )


def _runs(settings: TrainSettings) -> bool:
    """Whether the network of some settings can be built and run."""
    try:
        _create_checked(settings, pretrained=False)
    except LIBRARY_ERRORS:
        return False
    return True


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def backbone_options(settings: TrainSettings) -> dict[str, Any]:
    """Returns what timm needs beside the name to build the backbone of a config."""
    options: dict[str, Any] = {"num_classes": 0, "drop_path_rate": settings.drop_path_rate}
    if takes_image_size(settings.model):
        options["img_size"] = settings.image_size
    if settings.global_pool:
        options["global_pool"] = settings.global_pool
    return options


def _backbone_config(name: str) -> dict[str, Any]:
    renamed = get_deprecated_models().get(name)
    if renamed:
        raise UserError(f'timm calls "{name}" "{renamed}" now; use that name')
    if not timm.is_model(name):
        raise UserError(f'timm has no model "{name}", {did_you_mean(name, timm.list_models())}')
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        architecture, _, tag = name.partition(".")
        known = timm.list_models(f"{architecture}.*", include_tags=True)
        tags = ", ".join(each.partition(".")[2] for each in known) or "none"
        raise UserError(
            f'timm has no weights "{tag}" for {architecture}; known tags are: {tags}; '
            f"--model {architecture} takes the default ones"
        ) from None
    values: dict[str, Any] = config.to_dict()
    return values


def takes_image_size(name: str) -> bool:
    """Whether the backbone is built for one image size (transformers), or takes any (convolutional nets)."""
    return bool(_backbone_config(name).get("fixed_input_size"))


def _create_backbone(name: str, pretrained: bool | str, options: dict[str, Any]) -> nn.Module:
    """Builds a backbone, with weights perhaps. Raises UserError where the model or its weights cannot be had."""
    overlay: dict[str, Any] | None = None
    if isinstance(pretrained, str):
        path = local_file(pretrained)
        overlay = {"file": str(path)} if path else {"hf_hub_id": hub_id(pretrained)}
    drawn_from = torch.get_rng_state()
    try:
        backbone: nn.Module = timm.create_model(
            name, pretrained=bool(pretrained), pretrained_cfg_overlay=overlay, **options
        )
    except (*LIBRARY_ERRORS, OSError, EOFError, SafetensorError, UnpicklingError) as error:
        if "drop_path_rate" in str(error) and options.get("drop_path_rate") == 0:
            accepted = {key: value for key, value in options.items() if key != "drop_path_rate"}
            return _create_backbone(name, pretrained, accepted)
        if not pretrained:
            raise
        timm.create_model(name, **options)  # raises if the weights are not the cause
        raise UserError(
            f"the pretrained weights of {name} cannot be had ({_first_line(error)}); connect to the hub, give a local "
            "file (--pretrained weights.safetensors), or start from random weights on purpose (--pretrained false)"
        ) from error
    if isinstance(pretrained, str):
        _refuse_unfilled(backbone, name, pretrained, options, drawn_from)
    return backbone


def _refuse_unfilled(
    backbone: nn.Module, name: str, pretrained: str, options: dict[str, Any], drawn_from: Tensor
) -> None:
    """Raises a UserError where weights still have the values that `drawn_from` gave them; timm would only log it."""
    with torch.random.fork_rng():
        torch.set_rng_state(drawn_from)
        random = timm.create_model(name, **options).state_dict()
    drawn = {key for key, value in random.items() if value.ndim > 1 and value.float().std() > 0}
    unfilled = [
        key
        for key, value in backbone.state_dict().items()
        if key in drawn and torch.equal(value, random[key])
    ]
    if unfilled:
        raise UserError(
            f"{pretrained} fills {len(drawn) - len(unfilled)} of the {len(drawn)} weight matrices of {name}, not "
            f"{unfilled[0]}; give weights of this backbone (of a run of this toolkit: its folder fold_<k>/backbone)"
        )
