"""The ONNX graph: uint8 images in, features, logits and optional outputs out, any batch size."""

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
from onnxruntime.quantization import QuantType as OrtQuantType
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor

from export.formats import ArtifactSpec, BuildInputs
from export.network import ArtifactNetwork, artifact_network
from export.precision import pointwise_convs_as_linear
from infer.engines.contract import AUX, IMAGES, LOGITS
from isic.layout import NONE, ONNX_FILE

OPSET = 20
"""The first opset with Gelu as one node; ONNX Runtime runs it from version 1.17 on."""
BFLOAT16_OPSET = 22
"""The first opset with bfloat16 convolutions; ONNX Runtime refuses such a graph of an older one."""
# ONNX Runtime on a CPU is no faster with it. The node's attribute `softmax_precision` must be
# absent, because TensorRT's parser refuses it ("not supported in TensorRT Attention", seen with
# TensorRT-RTX 1.7; no report found); the fused kernels choose the precision.
ATTENTION_OPSET = 23
"""The first opset with Attention as one node, which TensorRT fuses."""
# torch.export treats a dimension of size 0 or 1 as a constant.
TRACED_BATCH = 2
"""Images in the example that a network is traced with."""
# Convolutions are slower as integers, unless they are products (see `pointwise_convs_as_linear`);
# the other operators have no weights.
INT8_OPERATORS = ["MatMul", "Gemm"]


def file_name(spec: ArtifactSpec) -> str:
    # float32 without views has the usual name.
    parts = [part for part in spec.variant if part != "fp32"]
    return ".".join((Path(ONNX_FILE).stem, *parts, "onnx"))


def build(spec: ArtifactSpec, inputs: BuildInputs, path: Path) -> dict[str, Any]:
    """Write the graph of a network for images [N, size, size, 3], with metadata about it."""
    opset = BFLOAT16_OPSET if spec.precision == "bf16" else OPSET
    if spec.precision == "int8":
        model = pointwise_convs_as_linear(inputs.model)
        graph = int8_graph(ArtifactNetwork(model, spec.options.tta), inputs.size, path.parent)
    else:
        network = artifact_network(inputs.model, spec.precision, spec.options.tta)
        graph = trace(network, inputs.size, opset)
    onnx.helper.set_model_props(graph, metadata(spec, inputs))
    onnx.save(graph, path)
    return {"opset": opset}


def metadata(spec: ArtifactSpec, inputs: BuildInputs) -> dict[str, str]:
    """Return the file's ONNX metadata properties: its origin and its preprocessing."""
    labels = {} if spec.fold == NONE else {LOGITS: ["malignant"]}
    if inputs.aux:
        labels[AUX] = list(inputs.aux)
    return {
        "name": spec.config,
        "fold": str(spec.fold),
        "precision": spec.precision,
        "tta": spec.options.tta,
        "preprocess": inputs.preprocess.model_dump_json(),
        "labels": json.dumps(labels),
    }


def trace(network: ArtifactNetwork, size: int, opset: int) -> onnx.ModelProto:
    """Return the graph of a network in eval mode on the CPU, for images [N, size, size, 3]."""
    example = torch.zeros((TRACED_BATCH, size, size, 3), dtype=torch.uint8)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        quiet("torch.onnx", "onnxscript"),
    ):
        warnings.simplefilter("ignore")  # they are about the exporter's own internals
        program = torch.export.export(
            network,
            (example,),
            dynamic_shapes={IMAGES: {0: torch.export.Dim("batch")}},
            strict=False,
        )
        # Decomposed into `attention`, whose softmax is in float32; later opsets have one node.
        if opset < ATTENTION_OPSET:
            program = program.run_decompositions(
                {torch.ops.aten.scaled_dot_product_attention.default: attention}
            )
        exported = torch.onnx.export(
            program,
            (example,),
            input_names=[IMAGES],
            output_names=list(network.output_names),
            opset_version=opset,
            external_data=False,
            dynamo=True,
        )
    assert exported is not None
    graph: onnx.ModelProto = exported.model_proto
    for node in graph.graph.node:
        # Stack traces with the paths of this machine: a fifth of a small file, and different bytes
        # for every checkout.
        del node.metadata_props[:]
    return graph


def attention(
    query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any
) -> Tensor:
    """Scaled dot-product attention without a mask, its softmax in float32 for any input type."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    # An explicit cast, because the exporter writes softmax's argument `dtype` as a cast of the
    # result and not of the input (pytorch/pytorch#153393; still so in onnxscript 0.7.2).
    return scores.to(torch.float32).softmax(dim=-1).to(value.dtype) @ value


def int8_graph(network: ArtifactNetwork, size: int, folder: Path) -> onnx.ModelProto:
    """Return the graph of a network with int8 weights; `folder` is for temporary files."""
    graph = trace(network, size, OPSET)
    # Without the exporter's shapes: the quantizer infers its own, and fails with "Inferred shape
    # and existing shape differ" (seen with ONNX Runtime 1.31 and torch 2.14; no report found).
    del graph.graph.value_info[:]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        float_path = Path(temporary) / "float32.onnx"
        int8_path = Path(temporary) / "int8.onnx"
        onnx.save(graph, float_path)
        quantize_weights(float_path, int8_path)
        return onnx.load(int8_path)


def quantize_weights(source: Path, path: Path) -> None:
    """Write a float32 graph with int8 weights, whose activations are quantized at run time."""
    # Static ranges, calibrated on real images (Q/DQ of the same products), are no better: on two
    # cores with VNNI they took 1 to 11 % more CPU time for a ViT-Tiny, a ConvNeXt-Tiny and a small
    # trained ViT, and their error (1 - cosine) was 1.5 to 6 times as large.
    with quiet("root"):
        quantize_dynamic(
            source,
            path,
            op_types_to_quantize=INT8_OPERATORS,
            weight_type=OrtQuantType.QInt8,
            per_channel=True,
        )


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silence the warnings of some loggers; `root` is the logger above all others."""
    loggers = [logging.getLogger(None if name == "root" else name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
