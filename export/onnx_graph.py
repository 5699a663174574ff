"""The ONNX graph: uint8 images in, features, logits and perhaps a mask out, any batch size."""

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor

from export.formats import Target
from export.precision import lowered, with_products
from train.model import Classifier

OPSET = 20
"""Gelu is one node from opset 20 on, and ONNX Runtime runs it from version 1.17 on."""
BFLOAT16_OPSET = 22
"""The first opset whose convolutions take bfloat16; ONNX Runtime refuses such a graph of an older one."""
ATTENTION_OPSET = 23
"""Attention is one node from opset 23 on, which TensorRT fuses; ONNX Runtime on a CPU is no faster for it.

The node's own `softmax_precision` is left out, because TensorRT's parser refuses it; its fused kernels decide."""
TRACED_BATCH = 2
"""torch.export specialises a dimension of size 0 or 1, so the graph is traced with two images."""
QUANTIZED = ["MatMul", "Gemm"]
"""What int8 is for: convolutions that are no products are slower as integers, and the rest has no weights."""


def file_name(target: Target) -> str:
    return "model.onnx" if target.precision == "fp32" else f"model.{target.precision}.onnx"


def build(model: Classifier, target: Target, path: Path) -> dict[str, Any]:
    """Writes the graph of `model` for images [N, size, size, 3] and says in its metadata what it is."""
    opset = BFLOAT16_OPSET if target.precision == "bf16" else OPSET
    if target.precision == "int8":
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / "model.onnx"
            graph = trace(with_products(model), target.size, OPSET)
            del graph.graph.value_info[
                :
            ]  # the quantizer infers shapes itself, and stumbles over the exporter's
            onnx.save(graph, whole)
            quantize(whole, path)
        graph = onnx.load(path)
    else:
        graph = trace(lowered(model, target.precision), target.size, opset)
    onnx.helper.set_model_props(graph, metadata(target))
    onnx.save(graph, path)
    return {"opset": opset}


def metadata(target: Target) -> dict[str, str]:
    """Returns what the file says of itself, as ONNX metadata properties."""
    return {
        "name": target.config,
        "fold": str(target.fold),
        "precision": target.precision,
        "preprocess": target.spec.model_dump_json(),
        "labels": json.dumps({"logits": ["malignant"]}),
    }


def trace(model: Classifier, size: int, opset: int) -> onnx.ModelProto:
    """Returns the graph of `model` (in eval mode, on the CPU) for images uint8 [N, size, size, 3]."""
    example = torch.zeros((TRACED_BATCH, size, size, 3), dtype=torch.uint8)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        quiet("torch.onnx", "onnxscript"),
    ):
        warnings.simplefilter("ignore")  # the exporter's notes on its own internals
        program = torch.export.export(
            model,
            (example,),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            strict=False,
        )
        if opset < ATTENTION_OPSET:
            program = program.run_decompositions(
                {torch.ops.aten.scaled_dot_product_attention.default: attention}
            )
        exported = torch.onnx.export(
            program,
            (example,),
            input_names=["images"],
            output_names=list(model.output_names),
            opset_version=opset,
            external_data=False,
            dynamo=True,
        )
    assert exported is not None
    graph: onnx.ModelProto = exported.model_proto
    return graph


def attention(
    query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any
) -> Tensor:
    """Scaled dot-product attention without a mask, its softmax in float32 whatever the inputs are."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    # A cast of its own: the exporter would write softmax's argument `dtype` as a cast of its result.
    return scores.to(torch.float32).softmax(dim=-1).to(value.dtype) @ value


def quantize(source: Path, path: Path) -> None:
    """Writes a float32 graph with int8 weights, whose activations are quantized as they come.

    Ranges calibrated on real images (static Q/DQ of the same products) do not win: on two cores with VNNI they took 1
    to 11 % more CPU time than this for a ViT-Tiny, a ConvNeXt-Tiny and a small trained ViT, and the error (1 - cosine)
    was one and a half to six times this one's.
    """
    with quiet("root"):
        quantize_dynamic(
            source,
            path,
            op_types_to_quantize=QUANTIZED,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keeps the warnings of some loggers to itself; `root` is the logger above all."""
    loggers = [logging.getLogger(name if name != "root" else None) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
