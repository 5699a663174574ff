"""int8 and fp8 as explicit pairs of QuantizeLinear and DequantizeLinear (Q/DQ) in the ONNX graph.

TensorRT fuses the pairs before the inputs of a product into a product of the quantized type. Its
rules: zero points of 0, scales in the type of the surrounding tensors, one scale per tensor for
activations and one per output channel for weights, and biases that are not quantized.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from infer.engines.contract import IMAGES
from infer.engines.onnxruntime import LOAD_ERRORS, PROVIDERS, session_options
from isic.preprocess import Pixels
from isic.runtime.errors import UserError, first_line


@dataclass(frozen=True)
class QuantType:
    """A quantized type."""

    code: int
    """Its number in ONNX."""
    dtype: torch.dtype
    largest: float
    """The value that a scale maps the end of a range to."""
    operators: frozenset[str]
    """Operators that TensorRT has kernels for in this type."""


BASE_PRECISION = "fp16"
"""Precision of the graph before quantization; the layers that are not quantized keep it."""
QUANT_TYPES = {
    "int8": QuantType(TensorProto.INT8, torch.int8, 127, frozenset({"MatMul", "Gemm", "Conv"})),
    # Without Conv: NVIDIA documents fp8 in TensorRT-RTX for matrix products only, and it ran some
    # fp8 convolutions in float32 (seen with TensorRT-RTX 1.7; no report found).
    "fp8": QuantType(
        TensorProto.FLOAT8E4M3FN, torch.float8_e4m3fn, 448, frozenset({"MatMul", "Gemm"})
    ),
}
# Convolutions with fewer channels, such as the stem and depthwise ones, have no fast int8 kernel.
MIN_CONV_CHANNELS = 16
"""Fewest input and output channels of a quantized convolution."""
CALIBRATION_BATCH_SIZE = 4
"""Images whose activations are in memory at once."""


def quantize(graph: onnx.ModelProto, precision: str, images: Pixels) -> dict[str, Any]:
    """Quantize the products of a float16 graph with constant weights, in place.

    Args:
        graph: a graph of the contract, from a model in BASE_PRECISION.
        precision: a key of QUANT_TYPES.
        images: uint8 [R, H, W, 3] that show the range of the activations.

    Returns:
        Fields for the manifest: the number of `images` and their `sha256`, and of `layers`.

    Raises:
        UserError: nothing in the graph can be quantized, there are no images, or activations
            overflow float16.
    """
    quant_type = QUANT_TYPES[precision]
    layers = find_layers(graph.graph, quant_type)
    if not layers:
        raise UserError(
            f"this network has no products to compute in {precision}; choose another --precision"
        )
    if not len(images):
        raise UserError(
            f"{precision} needs images to calibrate on, and there are none; give --data"
        )
    activations = list(dict.fromkeys(layer.input[0] for layer in layers))
    absmax = calibrate_absmax(graph, activations, images)
    insert_qdq(graph.graph, layers, absmax, quant_type)
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    return {"images": len(images), "sha256": digest, "layers": len(layers)}


def find_layers(graph: onnx.GraphProto, quant_type: QuantType) -> list[NodeProto]:
    """Return the nodes to quantize: dense products of an activation and a constant, in float16."""
    constants = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT16
    }
    layers = []
    for node in graph.node:
        if node.op_type not in quant_type.operators or node.input[1] not in constants:
            continue
        # [out, in / groups, ...] for a convolution: a depthwise one has one input channel per
        # group.
        channels = min(constants[node.input[1]].dims[:2])
        if node.op_type != "Conv" or channels >= MIN_CONV_CHANNELS:
            layers.append(node)
    return layers


def calibrate_absmax(
    graph: onnx.ModelProto, names: Sequence[str], images: Pixels
) -> dict[str, float]:
    """Run the graph on images and return the largest magnitude of each named float16 activation.

    Raises:
        UserError: values are not finite, or ONNX Runtime lacks one of the graph's operators.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(graph)
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in names]
    replace_all(watched.graph.output, outputs)
    try:
        session = ort.InferenceSession(
            watched.SerializeToString(), session_options(), providers=PROVIDERS["cpu"]
        )
    except LOAD_ERRORS as error:
        raise UserError(
            f"ONNX Runtime {ort.__version__} cannot calibrate ({first_line(error)}); install a "
            "newer one"
        ) from None
    # Clipping rare values instead, for the smallest squared error, makes the worst image worse: for
    # a trained ViT with outliers the cosine to float32 is 0.993 instead of 0.994 in int8, and 0.990
    # instead of 0.996 in fp8.
    largest = np.zeros(len(names))
    for start in range(0, len(images), CALIBRATION_BATCH_SIZE):
        batch = images[start : start + CALIBRATION_BATCH_SIZE]
        values = session.run(names, {IMAGES: batch})
        largest = np.maximum(largest, [np.abs(value).max() for value in values])
    if not np.isfinite(largest).all():
        raise UserError(
            "activations overflow float16, the type of the layers that are not quantized; choose "
            "bf16 or fp32"
        )
    return dict(zip(names, largest.tolist(), strict=True))


def absmax_to_scale(absmax: NDArray[np.float32], quant_type: QuantType) -> NDArray[np.float16]:
    """Return the scales that map the ends of ranges to the largest quantized value.

    An empty range has the scale 1.
    """
    scales = (absmax / quant_type.largest).astype(np.float16)
    # A subnormal float16 has few bits, and 0 would divide by zero.
    normal = np.maximum(scales, np.finfo(np.float16).smallest_normal)
    return np.where(absmax > 0, normal, 1).astype(np.float16)


def quantize_values(
    values: NDArray[np.float32], scale: NDArray[np.float16], quant_type: QuantType
) -> torch.Tensor:
    """Return values as the quantized type; values beyond its range become its ends."""
    scaled = torch.from_numpy(values / scale.astype(np.float32))
    scaled = scaled.clamp(-quant_type.largest, quant_type.largest)
    if not quant_type.dtype.is_floating_point:
        scaled = scaled.round()
    return scaled.to(quant_type.dtype)


def insert_qdq(
    graph: onnx.GraphProto,
    layers: Sequence[NodeProto],
    absmax: Mapping[str, float],
    quant_type: QuantType,
) -> None:
    """Insert Q/DQ pairs before the activations of layers, and quantize their weights.

    `absmax` is the largest magnitude of each activation by name.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    layer_outputs = {layer.output[0] for layer in layers}
    # In the order of the graph, which must stay topological: a pair comes before its first layer.
    nodes: list[NodeProto] = []
    inserted: set[str] = set()
    for node in graph.node:
        if node.output[0] in layer_outputs:
            activation, weight = node.input[:2]
            # Query, key and value are products of one activation, and share its pair; a weight
            # can be shared too.
            if activation not in inserted:
                nodes += _activation_qdq(graph, activation, absmax[activation], quant_type)
            if weight not in inserted:
                nodes.append(_weight_dq(graph, weights[weight], channel_axis(node), quant_type))
            inserted |= {activation, weight}
            node.input[0] = f"{activation}_dequantized"
            node.input[1] = f"{weight}_dequantized"
        nodes.append(node)
    replace_all(graph.node, nodes)
    used = {name for node in graph.node for name in node.input}
    replace_all(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])


def channel_axis(node: NodeProto) -> int:
    """Return the axis of a layer's weights that is the output channel."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1


def _activation_qdq(
    graph: onnx.GraphProto, name: str, absmax: float, quant_type: QuantType
) -> list[NodeProto]:
    """Return the Q and the DQ node of an activation; add their constants to the graph."""
    scale = absmax_to_scale(np.array(absmax, np.float32), quant_type)
    parameters = _parameters(graph, name, scale, quant_type)
    quantized = f"{name}_quantized"
    return [
        helper.make_node("QuantizeLinear", [name, *parameters], [quantized]),
        helper.make_node("DequantizeLinear", [quantized, *parameters], [f"{name}_dequantized"]),
    ]


def _weight_dq(
    graph: onnx.GraphProto, weight: TensorProto, axis: int, quant_type: QuantType
) -> NodeProto:
    """Return the DQ node of a weight; add the quantized weight and its constants to the graph."""
    name = weight.name
    values = numpy_helper.to_array(weight).astype(np.float32)
    other_axes = tuple(other for other in range(values.ndim) if other != axis)
    absmax = np.abs(values).max(axis=other_axes, keepdims=True)
    scale = absmax_to_scale(absmax, quant_type)
    raw = quantize_values(values, scale, quant_type).view(torch.uint8).numpy().tobytes()
    quantized = f"{name}_quantized"
    graph.initializer.append(
        helper.make_tensor(quantized, quant_type.code, values.shape, raw, raw=True)
    )
    inputs = [quantized, *_parameters(graph, name, scale.ravel(), quant_type)]
    return helper.make_node("DequantizeLinear", inputs, [f"{name}_dequantized"], axis=axis)


def _parameters(
    graph: onnx.GraphProto, name: str, scale: NDArray[np.float16], quant_type: QuantType
) -> tuple[str, str]:
    """Add a scale and its zero point to the graph and return their names."""
    # ONNX takes the quantized type from the zero point, even if it is 0.
    zeros = helper.make_tensor(
        f"{name}_zero", quant_type.code, scale.shape, bytes(scale.size), raw=True
    )
    graph.initializer.extend([numpy_helper.from_array(scale, f"{name}_scale"), zeros])
    return f"{name}_scale", f"{name}_zero"


def replace_all(field: Any, messages: Iterable[Any]) -> None:
    messages = list(messages)
    del field[:]
    field.extend(messages)
