"""A network cast to a lower precision the plain way, as its users do."""

import torch
from torch import Tensor, nn


class LowPrecision(nn.Module):
    """A module with its weights in a low precision, between float32 inputs and outputs."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module.to(dtype)
        self.dtype = dtype

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.module(inputs.to(self.dtype))
        return outputs.float()
