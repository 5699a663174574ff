"""Backbones from timm: their configs, options and weights."""

from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import get_deprecated_models
from torch import Tensor, nn

from isic.runtime.errors import UserError, did_you_mean, first_line
from train.config import TrainSettings
from train.pretrained import hub_id, local_file

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


def pretrained_config(name: str) -> dict[str, Any]:
    """Return timm's pretrained config of a model. Raise a UserError if there is none."""
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
    """Return whether the backbone is built for one image size, as transformers are."""
    return bool(pretrained_config(name).get("fixed_input_size"))


def backbone_options(settings: TrainSettings) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` for the backbone of a config."""
    options: dict[str, Any] = {"num_classes": 0, "drop_path_rate": settings.drop_path_rate}
    if takes_image_size(settings.model):
        options["img_size"] = settings.image_size
    if settings.global_pool:
        options["global_pool"] = settings.global_pool
    return options


def create_backbone(name: str, pretrained: bool | str, options: dict[str, Any]) -> nn.Module:
    """Build a backbone and load its weights, if any.

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
            return create_backbone(name, pretrained, accepted)
        if not pretrained:
            raise
        timm.create_model(name, **options)  # raises if the options are the cause, not the weights
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"cannot load the pretrained weights of {name} ({reason}); connect to the "
            "hub, give a local file (--pretrained weights.safetensors), or start from random "
            "weights (--pretrained false)"
        ) from error
    if isinstance(pretrained, str):
        _refuse_unfilled(backbone, name, pretrained, options, rng_state)
    return backbone


def _refuse_unfilled(
    backbone: nn.Module, name: str, pretrained: str, options: dict[str, Any], rng_state: Tensor
) -> None:
    """Raise a UserError if weights still have their random values; timm would only log it.

    Args:
        backbone: built from `rng_state`, then filled from a file.
        rng_state: torch's random state before the backbone was built.
    """
    with torch.random.fork_rng():
        torch.set_rng_state(rng_state)
        random = timm.create_model(name, **options).state_dict()
    # Biases, norms and layer scales start as constants, so only other matrices show whether values
    # were loaded. Not by the deviation, which rounding can make positive for a constant.
    matrices = {
        key for key, value in random.items() if value.ndim > 1 and value.min() < value.max()
    }
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
