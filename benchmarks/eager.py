"""The network in PyTorch itself, as timm gives it: eagerly, and through torch.compile."""

import torch
from torch import Tensor, nn

from benchmarks.fresh import create_fresh
from benchmarks.limits import DTYPES
from infer.engines import Outputs
from infer.engines.aoti import forbid_tf32
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


class EagerEngine:
    """A config's fresh network as an engine, from host to host."""

    def __init__(self, config: str, engine: str, precision: str, device: str) -> None:
        forbid_tf32()
        model = create_fresh(config).model
        network = model if precision == "fp32" else _Lowered(model, DTYPES[precision])
        self.device, self._model = device, network.to(device)
        if engine == "compile":
            self._model.compile(dynamic=False)

    @torch.inference_mode()
    def run(self, images: Pixels) -> Outputs:
        outputs = self._model(torch.from_numpy(images).to(self.device, non_blocking=True))
        features, logits = (part.to("cpu").numpy() for part in outputs[:2])
        return features, logits

    def allocate(self, shape: tuple[int, int, int, int]) -> Pixels:
        """Returns an uninitialised uint8 array of this shape, in page-locked memory where the device is a GPU."""
        array: Pixels = torch.empty(
            shape, dtype=torch.uint8, pin_memory=self.device == "cuda"
        ).numpy()
        return array
