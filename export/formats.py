"""The formats an export can have, as data: a new one is a row here and a file beside this one."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from isic.errors import UserError, did_you_mean
from train.model import Classifier

Builder = Callable[[Classifier, int, Path], None]
"""Writes the artifact of a model for images of a size under a path."""


@dataclass(frozen=True)
class Format:
    """One format: what its files are called and who builds them."""

    suffix: str
    module: str
    """Module with `build(model, size, path)`."""
    min_cosine: float
    """Parity: least cosine of any image's features to the checkpoint in float32."""
    max_logit_error: float
    """Parity: largest absolute error of a logit."""

    @property
    def build(self) -> Builder:
        builder: Builder = import_module(self.module).build
        return builder


FORMATS = {
    "onnx": Format(suffix=".onnx", module="export.onnx_graph", min_cosine=0.99999, max_logit_error=1e-3),
}


def find_format(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f'--formats: no format "{name}", {did_you_mean(name, FORMATS)}')
    return FORMATS[name]
