"""The machine's limits, measured, and the work of a network, counted."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.timing import seconds_of
from infer.engines.onnxruntime import session_options

MIN_CALLS = 3
SECONDS = 1.0
"""Approximate length of a measurement."""
MAX_SECONDS = 3.0
"""Longest large matrix product, estimated from the small one."""
# The small product estimates the time of the large, measured one.
SIDES = {"cpu": (256, 1024), "cuda": (1024, 8192)}
"""Sides of the square matrices."""
# Many times the caches.
COPIED = {"cpu": 2**28, "cuda": 2**32}
"""Bytes of the copied array; on a GPU at most 1/4 of the free memory."""
# Old enough for every supported ONNX Runtime.
MATMUL_OPSET = 13
MATMUL_IR = 8
DTYPE_OF_PRECISION = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
# On a CPU, int8 layers read and write float32; fp8 layers read and write float16.
ACTIVATION_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 4, "fp8": 2}
"""Bytes of a value between two layers, by precision."""
WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
FLOPS = {
    **flop_registry,
    # Missing in torch 2.14 (pytorch#195460); drop when the registry has it.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
}
"""torch's formulas of the floating-point operations of its operators."""


@dataclass(frozen=True)
class Work:
    """Work of a network's products, convolutions and attention; the rest can be fused."""

    flops: float
    """Floating-point operations per image; a multiply-add counts as two."""
    activations: float
    """Values read and written per image."""
    weights: float
    """Weights read per batch."""

    def bytes_per_image(self, precision: str, batch: int) -> float:
        """Return the least memory traffic per image at a batch size."""
        weight_bytes = self.weights * WEIGHT_BYTES[precision]
        return self.activations * ACTIVATION_BYTES[precision] + weight_bytes / batch


@dataclass(frozen=True)
class Limits:
    """Highest rates of a device in a precision."""

    matmul: float
    """Floating-point operations per second in a large matrix product."""
    copy: float
    """Bytes per second, read and written, in a large copy."""
    matmul_by: str = "torch"
    """The library of that product; rates of different libraries are not comparable over time."""

    def of(
        self, work: Work, precision: str, batch: int, images_per_second: float
    ) -> dict[str, Any]:
        """Return the columns that compare a rate with the limits."""
        traffic = work.bytes_per_image(precision, batch)
        allowed = {"matmul": self.matmul / work.flops, "copy": self.copy / traffic}
        binding = min(allowed, key=lambda name: allowed[name])
        return {
            "gflop_per_image": round(work.flops / 1e9, 3),
            "achieved_gflops": round(images_per_second * work.flops / 1e9, 1),
            "matmul_gflops": round(self.matmul / 1e9, 1),
            "matmul_by": self.matmul_by,
            "copy_gb_per_second": round(self.copy / 1e9, 1),
            "of_matmul": round(images_per_second / allowed["matmul"], 4),
            "of_copy": round(images_per_second / allowed["copy"], 4),
            "bound_by": binding,
            "limit_images_per_second": round(allowed[binding], 1),
        }


def limits(device: str, precision: str) -> Limits:
    """Measure a device; a precision slower than float32 gets the limit of float32."""
    rates = [(torch_rate(device, name), "torch") for name in {"fp32", precision}]
    if device == "cpu":
        # On some CPUs the product of ONNX Runtime is faster than that of torch.
        rates.append((_onnxruntime_rate(), "onnxruntime"))
    matmul, library = max(rates)
    measured = Limits(matmul, _copy_rate(device), library)
    if device == "cuda":
        torch.cuda.empty_cache()  # frees memory for the engine's own process
    return measured


@cache
def _onnxruntime_rate() -> float:
    """Return float32 operations per second of ONNX Runtime's product by a constant on the CPU."""
    # A constant right side, as in a network's layers, is packed once when the session opens.
    side = SIDES["cpu"][1]
    left = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    right = np.random.default_rng(1).standard_normal((side, side), dtype=np.float32)
    session = onnxruntime.InferenceSession(
        _product_graph(right), session_options(), providers=["CPUExecutionProvider"]
    )
    return 2.0 * side**3 / _best_seconds(lambda: session.run(None, {"left": left}), "cpu")


def _product_graph(right: NDArray[np.float32]) -> bytes:
    """Return an ONNX model that multiplies its input by `right`."""
    shape = list(right.shape)
    left = helper.make_tensor_value_info("left", TensorProto.FLOAT, shape)
    product = helper.make_tensor_value_info("product", TensorProto.FLOAT, shape)
    node = helper.make_node("MatMul", ["left", "right"], ["product"])
    constant = numpy_helper.from_array(right, "right")
    graph = helper.make_graph([node], "product", [left], [product], [constant])
    opset = helper.make_opsetid("", MATMUL_OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=MATMUL_IR)
    data: bytes = model.SerializeToString()
    return data


@cache
def torch_rate(device: str, precision: str) -> float:
    """Return operations per second of torch's product of two large matrices on `cpu` or `cuda`."""
    small, large = SIDES[device]
    small_seconds = _best_seconds(_product(device, precision, small), device)
    expected = small_seconds * (large / small) ** 3
    side = small if expected > MAX_SECONDS else large  # a type that the device emulates is slow
    return 2.0 * side**3 / _best_seconds(_product(device, precision, side), device)


def _product(device: str, precision: str, side: int) -> Callable[[], object]:
    shape = (side, side)
    if precision == "int8":
        left = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        right = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        return lambda: torch._int_mm(left, right)
    left = torch.randn(shape, device=device).to(DTYPE_OF_PRECISION[precision])
    right = torch.randn(shape, device=device).to(DTYPE_OF_PRECISION[precision])
    if precision == "fp8":
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(
            left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        )
    return lambda: left @ right


@cache
def _copy_rate(device: str) -> float:
    """Return the bytes per second, read and written, of a large copy."""
    size = COPIED[device]
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        size = min(size, free // 4)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(work: Callable[[], object], device: str) -> float:
    """Return the seconds of the fastest call; a limit is the best that the device can do."""

    def call() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    call()
    calls: list[float] = []
    while len(calls) < MIN_CALLS or sum(calls) < SECONDS:
        calls.append(seconds_of(call))
    return min(calls)


def count_work(model: nn.Module, size: int) -> Work:
    """Count the work of a network on uint8 images [N, size, size, 3], in eval mode on the CPU."""
    one = _counted(model, torch.zeros((1, size, size, 3), dtype=torch.uint8))
    two = _counted(model, torch.zeros((2, size, size, 3), dtype=torch.uint8))
    # A second image adds its activations; the weights are read once per batch.
    activations = float(two.values - one.values)
    return Work(float(two.flops - one.flops), activations, one.values - activations)


@torch.no_grad()  # inference_mode would dispatch a linear layer whole, which has no formula
def _counted(model: nn.Module, images: torch.Tensor) -> "_Counter":
    counter = _Counter()
    with counter:
        model(images)
    return counter


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the operations of FLOPS and the values that those operators read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
            leaves = tree_leaves((args, out))
            self.values += sum(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor))
        return out
