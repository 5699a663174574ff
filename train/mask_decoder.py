"""The head that predicts lesion masks from a backbone's feature maps."""

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

# At 4, lesions of a few pixels lose their outline.
MASK_STRIDE = 2
"""Input pixels per side of a mask's pixel."""
TRUNK_STRIDE = 4
"""Stride at which the feature maps are summed, if it divides the finest of their strides."""


class MaskDecoder(nn.Module):
    """Turns feature maps of one or several strides into one map of mask logits."""

    def __init__(self, channels: list[int], strides: list[int], width: int = 32) -> None:
        super().__init__()
        trunk = trunk_stride(min(strides))
        self.stride = MASK_STRIDE if trunk % MASK_STRIDE == 0 else trunk
        self.projections = nn.ModuleList()
        for count, stride in zip(channels, strides, strict=True):
            factor = stride // trunk
            # Pixel shuffle, because the interpolation of ONNX's Resize differs between runtimes.
            self.projections.append(
                nn.Sequential(
                    LayerNorm2d(count),
                    nn.Conv2d(count, width * factor**2, 1),
                    nn.PixelShuffle(factor),
                )
            )
        factor = trunk // self.stride
        # The name cannot change: checkpoints contain it.
        self.draw = nn.Sequential(
            LayerNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, factor**2, 3, padding=1),
            nn.PixelShuffle(factor),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return logits [N, h, w] of maps [N, C_i, h_i, w_i]."""
        projected = [project(part) for project, part in zip(self.projections, maps, strict=True)]
        logits: Tensor = self.draw(torch.stack(projected).sum(dim=0))
        return logits.squeeze(1)


def trunk_stride(finest: int) -> int:
    """Return the stride at which feature maps are summed."""
    for stride in (TRUNK_STRIDE, MASK_STRIDE):
        if finest % stride == 0:
            return stride
    return finest
