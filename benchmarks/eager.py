"""The network in PyTorch itself, as timm gives it: eagerly, and through torch.compile."""

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.fresh import create_fresh
from benchmarks.limits import DTYPES
from benchmarks.worker import Allocate, Run
from infer.engines import Outputs
from isic.preprocess import Pixels
from train.model import Classifier

ENGINES = ("eager", "compile")


class _Lowered(nn.Module):
    """Backbone and head with weights in a low precision; the input is normalised in float32."""

    def __init__(self, model: Classifier, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        model.backbone.to(dtype)
        model.head.to(dtype)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.backbone(self.model.normalised(images).to(self.dtype))
        return features.float(), self.model.head(features).float()


def open_eager(config: str, engine: str, precision: str, device: str) -> tuple[Run, Allocate]:
    """Returns what runs a config's fresh network from host to host, and what allocates its input (pinned for a GPU)."""
    fresh = create_fresh(config)
    network: nn.Module = fresh.model
    if precision != "fp32":
        network = _Lowered(fresh.model, DTYPES[precision])
    network = network.to(device)
    if engine == "compile":
        network.compile(dynamic=False)

    @torch.inference_mode()
    def run(images: Pixels) -> Outputs:
        outputs = network(torch.from_numpy(images).to(device, non_blocking=True))
        features, logits = (part.to("cpu").numpy() for part in outputs[:2])
        return features, logits

    def allocate(shape: tuple[int, int, int, int]) -> Pixels:
        return np.asarray(torch.empty(shape, dtype=torch.uint8, pin_memory=device == "cuda").numpy(), np.uint8)

    return run, allocate
