"""The network in PyTorch itself, as timm gives it: eagerly, and through torch.compile."""

import torch
from torch import Tensor, nn

from benchmarks.limits import DTYPE_OF_PRECISION
from benchmarks.low_precision import LowPrecision
from benchmarks.untrained import create_untrained
from infer.engines import Outputs
from infer.engines.aoti import forbid_tf32
from isic.preprocess import Pixels
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


class EagerEngine:
    """The untrained network of a config as an engine, from host memory to host memory."""

    def __init__(self, config: str, engine: str, precision: str, device: str) -> None:
        forbid_tf32()
        model = create_untrained(config).model
        network: nn.Module = model
        if precision != "fp32":
            network = _LowPrecisionClassifier(model, DTYPE_OF_PRECISION[precision])
        self.device = device
        self._model = network.to(device)
        if engine == "compile":
            self._model.compile(dynamic=False)

    @torch.inference_mode()
    def run(self, images: Pixels) -> Outputs:
        outputs = self._model(torch.from_numpy(images).to(self.device, non_blocking=True))
        features, logits = (part.to("cpu").numpy() for part in outputs[:2])
        return features, logits

    def allocate(self, shape: tuple[int, int, int, int]) -> Pixels:
        """Return an uninitialised uint8 array, in page-locked memory if the device is a GPU."""
        pin_memory = self.device == "cuda"
        array: Pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory).numpy()
        return array
