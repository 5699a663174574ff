"""The ONNX graph: uint8 images in, features, logits and perhaps a mask out, any batch size."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch

from train.model import Classifier

OPSET = 20
"""Gelu is one node from opset 20 on, and ONNX Runtime runs it from version 1.17 on."""
TRACED_BATCH = 2
"""torch.export specialises a dimension of size 0 or 1, so the graph is traced with two images."""


def build(model: Classifier, size: int, path: Path) -> None:
    """Writes the graph of `model` (in eval mode, on the CPU) for images [N, size, size, 3]."""
    example = torch.zeros((TRACED_BATCH, size, size, 3), dtype=torch.uint8)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")  # the exporter's notes on its own internals
        torch.onnx.export(
            model,
            (example,),
            path,
            input_names=["images"],
            output_names=list(model.output_names),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            external_data=False,
            dynamo=True,
        )


@contextlib.contextmanager
def _quiet(*names: str):  # type: ignore[no-untyped-def]
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
