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
"""Input pixels per side of a mask's pixel: at 4, lesions of a few pixels lose their outline."""
TRUNK_STRIDE = 4
"""Stride at which the feature maps are summed, if it divides the finest of their strides."""

LIBRARY_ERRORS = (
    RuntimeError,
    AssertionError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""Errors of timm and torch about a backbone that does not fit the settings."""

HARMLESS = {
    "global_pool": None,
    "drop_path_rate": 0.0,
    "grad_checkpointing": False,
    "batch_size": 2,
    "mask_weight": 0.0,
}
"""Settings that a backbone may not support, with a value that every backbone supports."""
REFUSALS = {
    "global_pool": "{model} does not pool by {global_pool}; choose another --global_pool",
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
    output_names: tuple[str, ...] = ("features", "logits")
    dtype = torch.float32
    """Type that the backbone computes in if its weights were cast; AMP casts by itself."""
    mask_stride: int | None = None
    """Input pixels per side of a mask's pixel; None if the network predicts no masks."""

    def __init__(self, backbone: nn.Module, spec: PreprocessSpec, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.spec = spec
        # Some backbones change the width once more between pooling and their classifier.
        width: Any = getattr(backbone, "head_hidden_size", None) or backbone.num_features
        self.num_features = int(width)
        self.head = nn.Sequential(nn.Dropout(drop_rate), nn.Linear(self.num_features, 1))
        mean = 255 * torch.tensor(spec.mean)
        std = 255 * torch.tensor(spec.std)
        # Not persistent: a checkpoint stores the preprocessing in its config.
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("inverse_std", (1 / std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns features [N, D] (the backbone's output) and logits [N, 1], float32.

        Args:
            images: uint8 [N, H, W, 3], RGB; float32 in [0, 255] after mixup or cutmix.
        """
        features = self.backbone(self.normalised(images)).float()
        return features, self.logits(features)

    def logits(self, features: Tensor) -> Tensor:
        """Returns logits [N, 1] of features [N, D], float32.

        Under autocast too: in half precision many rows would share a logit and lose their order.
        """
        with without_autocast(features.device.type):
            logits: Tensor = self.head(features)
        return logits.float()

    def normalised(self, images: Tensor) -> Tensor:
        """Returns the backbone's input [N, 3, H, W]."""
        # Cast first: TensorRT accepts uint8 only as the input of a cast (NVIDIA/TensorRT#3985,
        # seen with TensorRT 10). The order may change once that is lifted.
        pixels = images.to(torch.float32).permute(0, 3, 1, 2)
        return ((pixels - self.mean) * self.inverse_std).to(self.dtype)

    @property
    def heads(self) -> list[nn.Module]:
        """The modules that train at the head's learning rate: all but the backbone."""
        return [self.head]


class MultiTask(Classifier):
    """A classifier that also predicts a mask of the lesion, from the same feature maps."""

    output_names = (*Classifier.output_names, "mask")

    def __init__(self, backbone: nn.Module, spec: PreprocessSpec, drop_rate: float = 0.0) -> None:
        super().__init__(backbone, spec, drop_rate)
        infos: Any = backbone.feature_info
        deepest: dict[int, int] = {}
        for index, info in enumerate(infos):
            deepest[info["reduction"]] = index
        strides = [stride for stride in deepest if stride >= MASK_STRIDE]
        self.map_indices = [deepest[stride] for stride in strides]
        channels = [infos[index]["num_chs"] for index in self.map_indices]
        self.decoder = MaskDecoder(channels, strides)
        self.mask_stride = self.decoder.stride

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns features [N, D], logits [N, 1] and the mask [N, H / stride, W / stride], float32.

        The mask is logits in training mode, for a loss that does not saturate, and probabilities in
        eval mode. Under autocast the decoder computes in half precision: its convolutions are
        expensive, and masks are thresholded anyway.
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
    """Turns feature maps of one or several strides into one map of mask logits.

    Each map is projected and upsampled by pixel shuffle to one stride, where they are summed. An
    exported graph has no Resize then, whose interpolation differs between runtimes.
    """

    def __init__(self, channels: list[int], strides: list[int], width: int = 32) -> None:
        super().__init__()
        trunk = trunk_stride(min(strides))
        self.stride = MASK_STRIDE if trunk % MASK_STRIDE == 0 else trunk
        self.projections = nn.ModuleList()
        for count, stride in zip(channels, strides, strict=True):
            factor = stride // trunk
            self.projections.append(
                nn.Sequential(
                    LayerNorm2d(count),
                    nn.Conv2d(count, width * factor**2, 1),
                    nn.PixelShuffle(factor),
                )
            )
        factor = trunk // self.stride
        # Named `draw` because the names of a checkpoint's weights contain it.
        self.draw = nn.Sequential(
            LayerNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, factor**2, 3, padding=1),
            nn.PixelShuffle(factor),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Returns logits [N, h, w] of maps [N, C_i, h_i, w_i]."""
        projected = [project(part) for project, part in zip(self.projections, maps, strict=True)]
        logits: Tensor = self.draw(torch.stack(projected).sum(dim=0))
        return logits.squeeze(1)


def trunk_stride(finest: int) -> int:
    """Returns the stride at which feature maps are summed; `finest` is the smallest of theirs."""
    for stride in (TRUNK_STRIDE, MASK_STRIDE):
        if finest % stride == 0:
            return stride
    return finest


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Returns a context without autocast.

    A null context if autocast is off: torch.export would record a disabled one as a submodule,
    which the ONNX exporter did not always support (pytorch/pytorch#136545).
    """
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def preprocess_spec(settings: TrainSettings) -> PreprocessSpec:
    """Returns the preprocessing of a config; mean and std are the backbone's own."""
    config = resolve_model_data_config(None, pretrained_cfg=_backbone_config(settings.model))
    return PreprocessSpec(
        size=settings.image_size,
        interpolation=settings.interpolation,
        mean=config["mean"],
        std=config["std"],
    )


def create_model(settings: TrainSettings, pretrained: bool | str | None = None) -> Classifier:
    """Builds the network of a config and checks it with one image.

    Args:
        settings: model, image size and drop rates.
        pretrained: overrides the settings' (False if the weights of a checkpoint follow).

    Raises:
        UserError: no such model, a setting does not fit it, or its weights cannot be loaded.
    """
    pretrained = settings.pretrained if pretrained is None else pretrained
    try:
        return _create_checked(settings, pretrained)
    except UserError:
        raise
    except LIBRARY_ERRORS as error:
        raise UserError(_explain(settings, _first_line(error))) from error


def _create_checked(settings: TrainSettings, pretrained: bool | str) -> Classifier:
    """Builds the network.

    Raises:
        UserError: no such model, or its weights cannot be loaded.
        LIBRARY_ERRORS: timm's backbone and the settings do not fit.
    """
    backbone = _create_backbone(settings.model, pretrained, backbone_options(settings))
    if settings.grad_checkpointing:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    network = MultiTask if settings.mask_weight else Classifier
    model = network(backbone, preprocess_spec(settings), settings.drop_rate)
    _check_outputs(model, settings.image_size)
    if settings.batch_size == 1:
        # Raises for a network with batch statistics of a single value.
        copy.deepcopy(model).train()(_blank_image(settings.image_size))
    return model


@torch.no_grad()
def _check_outputs(model: Classifier, size: int) -> None:
    """Raises a ValueError if an output for one image has an unexpected shape."""
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
    """Returns the error message for a network that cannot be built or run.

    It blames the first setting that makes the network work when changed, so that the message does
    not depend on the many ways in which libraries report one cause.

    Args:
        settings: of the network.
        reason: the library's error.
    """
    own_size = _backbone_config(settings.model)["input_size"][-1]
    task = "predict masks of images" if settings.mask_weight else "take images"
    blamed, fits = _find_remedy(settings, own_size)
    return REFUSALS[blamed].format(
        **dict(settings), reason=reason, task=task, fits=fits, own_size=own_size
    )


def _find_remedy(settings: TrainSettings, own_size: int) -> tuple[str, Any]:
    """Returns the first setting and value with which the network works, or ("model", None)."""
    sizes = [max(round(settings.image_size / stride), 1) * stride for stride in COMMON_STRIDES]
    remedies = [(name, value) for name, value in HARMLESS.items() if name != "mask_weight"]
    remedies += [("image_size", size) for size in (*sizes, own_size)]
    remedies += [("mask_weight", HARMLESS["mask_weight"])]
    for name, value in remedies:
        changed = settings.model_copy(update={name: value})
        if getattr(settings, name) != value and _runs(changed):
            return name, value
    return "model", None


def _runs(settings: TrainSettings) -> bool:
    """Whether the network can be built and run."""
    try:
        _create_checked(settings, pretrained=False)
    except LIBRARY_ERRORS:
        return False
    return True


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def backbone_options(settings: TrainSettings) -> dict[str, Any]:
    """Returns the arguments of `timm.create_model` for the backbone of a config."""
    options: dict[str, Any] = {"num_classes": 0, "drop_path_rate": settings.drop_path_rate}
    if takes_image_size(settings.model):
        options["img_size"] = settings.image_size
    if settings.global_pool:
        options["global_pool"] = settings.global_pool
    return options


def _backbone_config(name: str) -> dict[str, Any]:
    """Returns timm's pretrained config of a model. Raises a UserError if there is none."""
    new_name = get_deprecated_models().get(name)
    if new_name:
        raise UserError(f'timm calls "{name}" "{new_name}" now; use that name')
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
    """Whether the backbone is built for one image size (transformers) instead of taking any."""
    return bool(_backbone_config(name).get("fixed_input_size"))


def _create_backbone(name: str, pretrained: bool | str, options: dict[str, Any]) -> nn.Module:
    """Builds a backbone and loads its weights, if any.

    Raises:
        UserError: no such model, or its weights cannot be loaded.
        LIBRARY_ERRORS: the backbone does not take an option.
    """
    overlay: dict[str, Any] | None = None
    if isinstance(pretrained, str):
        path = local_file(pretrained)
        overlay = {"file": str(path)} if path else {"hf_hub_id": hub_id(pretrained)}
    rng_state = torch.get_rng_state()
    try:
        backbone: nn.Module = timm.create_model(
            name, pretrained=bool(pretrained), pretrained_cfg_overlay=overlay, **options
        )
    except (*LIBRARY_ERRORS, OSError, EOFError, SafetensorError, UnpicklingError) as error:
        if "drop_path_rate" in str(error) and options.get("drop_path_rate") == 0:
            # Some backbones do not know the option, not even as 0.
            accepted = {key: value for key, value in options.items() if key != "drop_path_rate"}
            return _create_backbone(name, pretrained, accepted)
        if not pretrained:
            raise
        timm.create_model(name, **options)  # raises if the options are the cause, not the weights
        raise UserError(
            f"cannot load the pretrained weights of {name} ({_first_line(error)}); connect to the "
            "hub, give a local file (--pretrained weights.safetensors), or start from random "
            "weights (--pretrained false)"
        ) from error
    if isinstance(pretrained, str):
        _refuse_unfilled(backbone, name, pretrained, options, rng_state)
    return backbone


def _refuse_unfilled(
    backbone: nn.Module, name: str, pretrained: str, options: dict[str, Any], rng_state: Tensor
) -> None:
    """Raises a UserError if weights still have their random values; timm would only log it.

    Args:
        backbone: built from `rng_state`, then filled from a file.
        name: of the model.
        pretrained: the setting, for the message.
        options: of the model.
        rng_state: torch's random state before the backbone was built.
    """
    with torch.random.fork_rng():
        torch.set_rng_state(rng_state)
        random = timm.create_model(name, **options).state_dict()
    # Biases and norms start as constants, so only matrices tell loaded values from initial ones.
    matrices = {key for key, value in random.items() if value.ndim > 1 and value.float().std() > 0}
    unfilled = [
        key
        for key, value in backbone.state_dict().items()
        if key in matrices and torch.equal(value, random[key])
    ]
    if unfilled:
        num_filled = len(matrices) - len(unfilled)
        raise UserError(
            f"{pretrained} fills {num_filled} of the {len(matrices)} weight matrices of {name}, "
            f"not {unfilled[0]}; give weights of this backbone (of a run of this toolkit: its "
            "folder fold_<k>/backbone)"
        )
