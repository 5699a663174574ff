"""Low precision written into the model before it is traced, so that every runtime computes in the same types."""

import copy

import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from train.model import Classifier

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

ISLANDS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, GlobalResponseNorm, _BatchNorm)
"""Layers that stay in float32: they square activations, which overflows float16, or sum many, which costs bfloat16.

Batch normalisation is among them because the exporter folds it into a bfloat16 convolution in another type.
"""
WIDE = 64
"""Channels from which on a 1x1 convolution's product in int8 saves more than the transpositions around it cost."""


def lowered(model: Classifier, precision: str) -> Classifier:
    """Returns a copy of the model that computes in `precision`, with its normalisation layers as float32 islands.

    It takes uint8 images and gives float32 outputs like the model itself. Explicit casts, unlike torch.autocast, leave
    no LayerNormalization with inputs of two types, which ONNX Runtime and TensorRT refuse.
    """
    model, dtype = copy.deepcopy(model), DTYPES[precision]
    if dtype == torch.float32:
        return model
    for part in (model.backbone, *model.heads):
        if part is not model.head:  # a few numbers, whose last digits order the logits
            part.to(dtype)
    model.dtype = dtype
    for module in model.modules():
        if isinstance(module, ISLANDS):
            module.float()
            module.register_forward_pre_hook(_into_float32)
            module.register_forward_hook(_OutOfFloat32(dtype))
    return model


def _into_float32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.float() for part in inputs)


class _OutOfFloat32:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.to(self.dtype)


def with_products(model: Classifier) -> Classifier:
    """Returns a copy whose wide 1x1 convolutions are linear layers over the channels, for what quantizes only those."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Conv2d and _is_product(layer):
                setattr(parent, name, _Product(layer))
    return model


def _is_product(conv: nn.Conv2d) -> bool:
    form = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
    return form == ((1, 1), (1, 1), (0, 0), 1) and min(conv.in_channels, conv.out_channels) >= WIDE


class _Product(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(conv.weight.flatten(1)), conv.bias

    def forward(self, maps: Tensor) -> Tensor:
        return nn.functional.linear(maps.permute(0, 2, 3, 1), self.weight, self.bias).permute(
            0, 3, 1, 2
        )
