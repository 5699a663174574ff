"""int8 and fp8 as explicit pairs of QuantizeLinear and DequantizeLinear in the ONNX graph.

TensorRT fuses such a pair before each input of a product into a product of the quantized types. Its rules: zero points
of 0, scales in the type of what surrounds the pair, one scale a tensor for activations and one an output channel for
weights, and biases left as they are. Ours beside them: all else of the graph keeps float16, and what is float32 there
(norms, softmax, the head) stays float32.
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

from infer.engines.onnxruntime import LOAD_ERRORS, PROVIDERS, session_options
from isic.preprocess import Pixels
from isic.runtime.errors import UserError


@dataclass(frozen=True)
class Kind:
    """A quantized type."""

    code: int
    """As ONNX numbers it."""
    dtype: torch.dtype
    largest: float
    """What a scale maps the end of a range to."""
    operators: frozenset[str]
    """Products that have kernels for it."""


BASE = "fp16"
"""Precision of the graph that is quantized: what is not quantized keeps it."""
QUANTIZED = {
    "int8": Kind(TensorProto.INT8, torch.int8, 127, frozenset({"MatMul", "Gemm", "Conv"})),
    # TensorRT-RTX promises fp8 for matrix products alone, and ran some convolutions in float32 after all.
    "fp8": Kind(TensorProto.FLOAT8E4M3FN, torch.float8_e4m3fn, 448, frozenset({"MatMul", "Gemm"})),
}
MIN_CHANNELS = 16
"""A convolution from or to fewer channels has no fast kernel; so a stem and depthwise convolutions stay as they are."""
BATCH_SIZE = 4
"""Images whose activations are held at once."""

Floats = NDArray[np.float32]


def quantize(graph: onnx.ModelProto, precision: str, images: Pixels) -> dict[str, Any]:
    """Quantizes the products of a float16 graph with constant weights, in place.

    Args:
        graph: of this toolkit's contract, from a model in BASE.
        precision: a key of QUANTIZED.
        images: uint8 [R, H, W, 3] that show which values the activations take.

    Returns:
        What a manifest is to say of it: `images` and their `sha256`, and the number of `layers`.

    Raises:
        UserError: nothing in the graph can be quantized, there are no images, or activations overflow float16.
    """
    kind = QUANTIZED[precision]
    layers = find_layers(graph.graph, kind)
    if not layers:
        raise UserError(
            f"this network has no products to compute in {precision}; choose another --precision"
        )
    if not len(images):
        raise UserError(f"{precision} takes images to calibrate on, and there is none; give --data")
    largest = largest_magnitudes(
        graph, list(dict.fromkeys(layer.input[0] for layer in layers)), images
    )
    insert_pairs(graph.graph, layers, largest, kind)
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    return {"images": len(images), "sha256": digest, "layers": len(layers)}


def find_layers(graph: onnx.GraphProto, kind: Kind) -> list[NodeProto]:
    """Returns the nodes to quantize: dense products of an activation and a constant, both float16."""
    halves = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT16
    }
    nodes = [
        node for node in graph.node if node.op_type in kind.operators and node.input[1] in halves
    ]
    return [
        node
        for node in nodes
        if node.op_type != "Conv" or min(halves[node.input[1]].dims[:2]) >= MIN_CHANNELS
    ]


def largest_magnitudes(
    graph: onnx.ModelProto, names: Sequence[str], images: Pixels
) -> dict[str, float]:
    """Runs the graph on images and returns the largest magnitude that each of some float16 activations takes.

    It is where ranges end. To clip rare values instead, for the least squared error of all, leaves the worst image
    further from float32: of a trained ViT with outliers the cosine is 0.993 instead of 0.994 in int8, and 0.990
    instead of 0.996 in fp8.

    Raises:
        UserError: values are not finite, or ONNX Runtime does not know the graph's operators.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(graph)
    replace(
        watched.graph.output,
        (helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in names),
    )
    try:
        session = ort.InferenceSession(
            watched.SerializeToString(), session_options(), providers=PROVIDERS["cpu"]
        )
    except LOAD_ERRORS as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"ONNX Runtime {ort.__version__} cannot calibrate ({reason}); install a newer one"
        ) from None
    largest = np.zeros(len(names))
    for at in range(0, len(images), BATCH_SIZE):
        values = session.run(names, {"images": images[at : at + BATCH_SIZE]})
        largest = np.maximum(largest, [np.abs(value).max() for value in values])
    if not np.isfinite(largest).all():
        raise UserError(
            "activations overflow float16, in which the rest of the network is to run; choose bf16 or fp32"
        )
    return dict(zip(names, largest.tolist(), strict=True))


def to_scale(ends: Floats, kind: Kind) -> NDArray[np.float16]:
    """Returns scales that map the ends of ranges to the largest quantized value; those of no range at all are 1."""
    scales = (ends / kind.largest).astype(np.float16)
    return np.where(ends > 0, np.maximum(scales, np.finfo(np.float16).smallest_normal), 1).astype(
        np.float16
    )


def codes(values: Floats, scale: NDArray[np.float16], kind: Kind) -> torch.Tensor:
    """Returns values as the quantized type; those beyond its range become its ends."""
    scaled = torch.from_numpy(values / scale.astype(np.float32)).clamp(-kind.largest, kind.largest)
    return (scaled if kind.dtype.is_floating_point else scaled.round()).to(kind.dtype)


def insert_pairs(
    graph: onnx.GraphProto, layers: Sequence[NodeProto], largest: Mapping[str, float], kind: Kind
) -> None:
    """Puts pairs before the activations, and quantized constants in the place of the weights, of some layers.

    Args:
        largest: magnitude of each activation, by name.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    chosen = {layer.output[0] for layer in layers}
    nodes: dict[str, NodeProto] = {}
    for node in graph.node:
        if node.output[0] in chosen:
            activation, weight = node.input[:2]
            if (
                f"{activation}_dequantized" not in nodes
            ):  # layers side by side share their input's pair
                nodes |= _activation_pair(graph, activation, largest[activation], kind)
            nodes |= _weight(graph, weights[weight], channel_axis(node), kind)
            node.input[0], node.input[1] = f"{activation}_dequantized", f"{weight}_dequantized"
        nodes[node.output[0]] = node
    replace(graph.node, nodes.values())
    used = {name for node in graph.node for name in node.input}
    replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])


def channel_axis(node: NodeProto) -> int:
    """Returns the axis of a layer's weights that its output channels lie on."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1


def _activation_pair(
    graph: onnx.GraphProto, name: str, largest: float, kind: Kind
) -> dict[str, NodeProto]:
    """Returns both nodes by their output; their constants are added to the graph."""
    parameters = _parameters(graph, name, to_scale(np.array(largest, np.float32), kind), kind)
    return {
        f"{name}_quantized": helper.make_node(
            "QuantizeLinear", [name, *parameters], [f"{name}_quantized"]
        ),
        f"{name}_dequantized": helper.make_node(
            "DequantizeLinear", [f"{name}_quantized", *parameters], [f"{name}_dequantized"]
        ),
    }


def _weight(
    graph: onnx.GraphProto, weight: TensorProto, axis: int, kind: Kind
) -> dict[str, NodeProto]:
    """Returns the node that dequantizes a weight, by its output; its constants are added to the graph."""
    name, values = weight.name, numpy_helper.to_array(weight).astype(np.float32)
    others = tuple(other for other in range(values.ndim) if other != axis)
    scale = to_scale(np.abs(values).max(axis=others, keepdims=True), kind)
    raw = codes(values, scale, kind).view(torch.uint8).numpy().tobytes()
    graph.initializer.append(
        helper.make_tensor(f"{name}_quantized", kind.code, values.shape, raw, raw=True)
    )
    inputs = [f"{name}_quantized", *_parameters(graph, name, scale.ravel(), kind)]
    output = f"{name}_dequantized"
    return {output: helper.make_node("DequantizeLinear", inputs, [output], axis=axis)}


def _parameters(
    graph: onnx.GraphProto, name: str, scale: NDArray[np.float16], kind: Kind
) -> tuple[str, str]:
    """Adds a scale and its zero point to the graph and returns their names."""
    zeros = helper.make_tensor(f"{name}_zero", kind.code, scale.shape, bytes(scale.size), raw=True)
    graph.initializer.extend([numpy_helper.from_array(scale, f"{name}_scale"), zeros])
    return f"{name}_scale", f"{name}_zero"


def replace(field: Any, messages: Iterable[Any]) -> None:
    """Gives a repeated field of a message other contents."""
    messages = list(messages)
    del field[:]
    field.extend(messages)
