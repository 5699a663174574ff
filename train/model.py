"""The network: uint8 pixels in, features and a logit out."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from isic.errors import UserError, did_you_mean
from isic.preprocess import PreprocessSpec
from train.config import TrainSettings


class Classifier(nn.Module):
    """A timm backbone and a linear head. It normalises its own input, so the graph takes raw pixels."""

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, backbone: nn.Module, spec: PreprocessSpec, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = int(backbone.num_features)  # type: ignore[arg-type]
        self.head = nn.Sequential(nn.Dropout(drop_rate), nn.Linear(self.num_features, 1))
        scale = 255 * torch.tensor(spec.std)
        self.register_buffer("mean", (255 * torch.tensor(spec.mean)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("inverse_std", (1 / scale).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features [N, D] (the backbone before the head) and logits [N, 1], float32.

        Args:
            images: uint8 [N, H, W, 3], RGB.
        """
        # The cast stands before the transposition because TensorRT refuses to transpose uint8.
        pixels = images.to(torch.float32).permute(0, 3, 1, 2)
        features = self.backbone((pixels - self.mean) * self.inverse_std)
        return features.float(), self.head(features).float()


def preprocess_spec(settings: TrainSettings) -> PreprocessSpec:
    """Returns the preprocessing of a config: its size and resize method, the backbone's own mean and std."""
    config = resolve_model_data_config(None, pretrained_cfg=_backbone_config(settings.model))
    return PreprocessSpec(
        size=settings.image_size, interpolation=settings.interpolation, mean=config["mean"], std=config["std"]
    )


def create_model(settings: TrainSettings, pretrained: bool | str | None = None) -> Classifier:
    """Builds the network of a config.

    Args:
        settings: model, image size and drop rates.
        pretrained: overrides the settings' (False when a checkpoint's weights follow).

    Raises:
        UserError: no such model, it cannot take the image size, or its weights cannot be had.
    """
    pretrained = settings.pretrained if pretrained is None else pretrained
    options: dict[str, Any] = {"num_classes": 0, "drop_path_rate": settings.drop_path_rate}
    if _takes_image_size(settings.model):
        options["img_size"] = settings.image_size
    backbone = _create_backbone(settings.model, pretrained, options)
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", (1, 1))[0]
    if settings.image_size % patch:
        raise UserError(
            f"{settings.model} cuts images into {patch} px patches; --image_size must be a multiple of {patch}"
        )
    return Classifier(backbone, preprocess_spec(settings), settings.drop_rate)


def _backbone_config(name: str) -> dict[str, Any]:
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if not timm.is_model(name) or config is None:
        raise UserError(f'timm has no model "{name}", {did_you_mean(name, timm.list_models())}')
    values: dict[str, Any] = config.to_dict()
    return values


def _takes_image_size(name: str) -> bool:
    """Whether the backbone is built for one image size (transformers), or takes any (convolutional nets)."""
    return bool(_backbone_config(name).get("fixed_input_size"))


def _create_backbone(name: str, pretrained: bool | str, options: dict[str, Any]) -> nn.Module:
    overlay: dict[str, Any] | None = None
    if isinstance(pretrained, str):
        path = Path(pretrained)
        if path.is_dir():
            path = path / "model.safetensors"
        looks_local = path.suffix in {".safetensors", ".pth", ".pt", ".bin"} or path.exists()
        if looks_local and not path.is_file():
            raise UserError(f"no weights at {pretrained}; give a file that exists, a hub name, or --pretrained false")
        overlay = {"file": str(path)} if looks_local else {"hf_hub_id": pretrained.removeprefix("hf-hub:")}
    try:
        backbone: nn.Module = timm.create_model(
            name, pretrained=bool(pretrained), pretrained_cfg_overlay=overlay, **options
        )
    except (OSError, RuntimeError, SafetensorError, KeyError) as error:
        if not pretrained:
            raise
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"the pretrained weights of {name} cannot be had ({reason}); connect to the hub, give a local file "
            "(--pretrained weights.safetensors), or start from random weights on purpose (--pretrained false)"
        ) from error
    return backbone
