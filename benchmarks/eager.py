"""The network in PyTorch itself, as timm gives it: eagerly, and through torch.compile."""

import torch
from torch import Tensor, nn

from benchmarks.limits import DTYPE_OF_PRECISION
from benchmarks.low_precision import LowPrecision
from benchmarks.untrained import create_untrained
from infer.engines.aoti import TorchEngine, forbid_tf32
from train.model import Classifier

TORCH_ENGINES = ("eager", "compile")


class _LowPrecisionClassifier(nn.Module):
    """Backbone and head in a low precision; the input is normalised in float32."""

    def __init__(self, model: Classifier, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.backbone = LowPrecision(model.backbone, dtype)
        self.head = LowPrecision(model.head, dtype)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(self.model.normalised(images))
        return features, self.head(features)


def eager_engine(config: str, engine: str, precision: str, device: str, batch: int) -> TorchEngine:
    """Return the untrained network of a config as an engine.

    Args:
        engine: one of TORCH_ENGINES.
        batch: images per call of the network.
    """
    forbid_tf32()
    model = create_untrained(config).model
    network: nn.Module = model
    if precision != "fp32":
        network = _LowPrecisionClassifier(model, DTYPE_OF_PRECISION[precision])
    network = network.to(device)
    if engine == "compile":
        network.compile(dynamic=False)
    return TorchEngine({0: network}, batch, device)
