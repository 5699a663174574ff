"""Casts the network to a precision before it is traced, so that all runtimes compute alike."""

import copy

import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from train.model import Classifier

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Batch normalisation is among them because the exporter's rule fuse_batchnorm folds it into a
# bfloat16 convolution in another type (seen with onnxscript 0.7.2; no report found).
FP32_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, GlobalResponseNorm, _BatchNorm)
"""Layers that stay in float32: they square activations, which overflows float16, or sum many, which
bfloat16 rounds too much."""
# Transpositions around the product included.
MIN_INT8_CHANNELS = 64
"""Channels from which a 1x1 convolution is faster as an int8 product."""
MAX_SUMS = 64
"""Outputs up to which a linear head can be a product and sums; a classifier may have thousands."""


def cast_model(model: Classifier, precision: str) -> Classifier:
    """Return a copy of the model that computes in `precision`, except for FP32_LAYERS.

    It takes uint8 images and returns float32 outputs like the model itself.
    """
    # torch.autocast instead of explicit casts would leave LayerNormalization nodes with inputs of
    # two types, which ONNX Runtime and TensorRT refuse.
    model = copy.deepcopy(model)
    dtype = TORCH_DTYPES[precision]
    if dtype == torch.float32:
        return model
    for part in (model.backbone, *model.heads):
        # Linear heads are cheap, and the last digits of the logits decide their order.
        if part not in model.linear_heads:
            part.to(dtype)
    model.dtype = dtype
    for module in model.modules():
        if isinstance(module, FP32_LAYERS):
            module.float()
            module.register_forward_pre_hook(_inputs_to_float32)
            module.register_forward_hook(_OutputTo(dtype))
    return model


def _inputs_to_float32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.float() for part in inputs)


class _OutputTo:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.to(self.dtype)


def head_as_sum(model: Classifier) -> Classifier:
    """Return a copy whose small linear heads are products and sums, without a float32 GEMM."""
    model = copy.deepcopy(model)
    for head in model.linear_heads:
        linear = head[-1]
        assert isinstance(linear, nn.Linear)
        # The products of many outputs would not fit the GPU's memory.
        if linear.out_features <= MAX_SUMS:
            head[-1] = ProductSum(linear)
    return model


class ProductSum(nn.Module):
    """A linear layer with few outputs, as an elementwise product and its sums."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, features: Tensor) -> Tensor:
        """Return [N, K] of features [N, D]."""
        return (features[:, None] * self.weight).sum(dim=-1) + self.bias


def pointwise_convs_as_linear(model: Classifier) -> Classifier:
    """Return a copy whose wide 1x1 convolutions are linear layers over the channels."""
    # Dynamic quantization is for matrix products only, so it would skip the convolutions.
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Conv2d and _is_wide_pointwise(layer):
                setattr(parent, name, PointwiseLinear(layer))
    return model


def _is_wide_pointwise(conv: nn.Conv2d) -> bool:
    form = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
    is_pointwise = form == ((1, 1), (1, 1), (0, 0), 1)
    return is_pointwise and min(conv.in_channels, conv.out_channels) >= MIN_INT8_CHANNELS


class PointwiseLinear(nn.Module):
    """A 1x1 convolution as a linear layer."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.flatten(1))
        self.bias = conv.bias

    def forward(self, maps: Tensor) -> Tensor:
        """Return [N, D, H, W] of feature maps [N, C, H, W]."""
        channels_last = maps.permute(0, 2, 3, 1)
        return nn.functional.linear(channels_last, self.weight, self.bias).permute(0, 3, 1, 2)
