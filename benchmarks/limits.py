"""What the machine can do at most, measured, and what a network asks of it, counted."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from infer.engines.onnxruntime import session_options

MIN_CALLS = 3
SECONDS = 1.0
"""Of a measurement, about."""
MAX_SECONDS = 3.0
"""Of one large matrix product, as the small one foretells it."""
SIDES = {"cpu": (256, 1024), "cuda": (1024, 8192)}
"""Of the square matrices that are multiplied: the first to find out how long it takes, the second to measure."""
COPIED = {"cpu": 2**28, "cuda": 2**32}
"""Bytes of the array that is copied: many times the caches. On a GPU half of what is free holds it and its copy."""
MATMUL_OPSET, MATMUL_IR = 13, 8
"""Old enough for every ONNX Runtime that runs the engines."""
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
ACTIVATION_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 4, "fp8": 2}
"""Of a value between two layers; layers in int8 on a CPU take and give float32, those in fp8 float16."""
WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
FLOPS = {
    **flop_registry,
    # torch 2.14 has no formula for its attention on a CPU
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
}
"""The operations that an operator counts as, by torch's formulas."""


@dataclass(frozen=True)
class Work:
    """What a network asks for."""

    flops: float
    """Floating-point operations an image, a multiply-add being two."""
    activations: float
    """Values that matrix products, convolutions and attention read and write an image; the rest can be fused."""
    weights: float
    """Values of weights that they read a batch."""

    def bytes_per_image(self, precision: str, batch: int) -> float:
        """Returns the least memory traffic of an image in a batch of some size."""
        per_batch = self.weights * WEIGHT_BYTES[precision]
        return self.activations * ACTIVATION_BYTES[precision] + per_batch / batch


@dataclass(frozen=True)
class Limits:
    """What a device does at most in a precision."""

    matmul: float
    """Floating-point operations a second in a large matrix product."""
    copy: float
    """Bytes a second, read and written, in a large copy."""
    matmul_by: str = "torch"
    """The library whose product that was: rates of two are no measure of a machine that changes."""

    def of(
        self, work: Work, precision: str, batch: int, images_per_second: float
    ) -> dict[str, Any]:
        """Returns what a rate means: what it achieves, its share of either limit, and which of the two binds.

        `limit_images_per_second` is what the binding one alone would allow.
        """
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
    """Measures a device. A precision that it computes slower than float32 has the limit of float32."""
    rates = [(torch_rate(device, name), "torch") for name in {"fp32", precision}]
    if device == "cpu":
        rates.append(
            (_onnxruntime_rate(), "onnxruntime")
        )  # on some CPUs torch's is not the fastest
    matmul, library = max(rates)
    measured = Limits(matmul, _copy_rate(device), library)
    if device == "cuda":
        torch.cuda.empty_cache()  # what is kept here an engine's process cannot have
    return measured


@cache
def _onnxruntime_rate() -> float:
    """Returns float32 operations a second of a product by a constant, as a network's layers are, on the CPU."""
    side = SIDES["cpu"][1]
    left, right = (
        np.random.default_rng(seed).standard_normal((side, side), dtype=np.float32)
        for seed in (0, 1)
    )
    shape = [side, side]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name in ("left", "product")
    ]
    node = helper.make_node("MatMul", ["left", "right"], ["product"])
    graph = helper.make_graph(
        [node], "product", ends[:1], ends[1:], [numpy_helper.from_array(right, "right")]
    )
    opset = [helper.make_opsetid("", MATMUL_OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=MATMUL_IR).SerializeToString()
    session = onnxruntime.InferenceSession(
        model, session_options(), providers=["CPUExecutionProvider"]
    )
    return 2.0 * side**3 / _seconds(lambda: session.run(None, {"left": left}), "cpu")


@cache
def torch_rate(device: str, precision: str) -> float:
    """Returns operations a second of torch's product of two large matrices on `cpu` or `cuda`."""
    small, large = SIDES[device]
    if _seconds(_product(device, precision, small), device) * (large / small) ** 3 > MAX_SECONDS:
        large = small  # a type that the device emulates
    return 2.0 * large**3 / _seconds(_product(device, precision, large), device)


def _product(device: str, precision: str, side: int) -> Callable[[], object]:
    if precision == "int8":
        left, right = (
            torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device)
            for _ in range(2)
        )
        return lambda: torch._int_mm(left, right)
    left, right = (torch.randn((side, side), device=device).to(DTYPES[precision]) for _ in range(2))
    if precision == "fp8":
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(
            left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        )
    return lambda: left @ right


@cache
def _copy_rate(device: str) -> float:
    room = torch.cuda.mem_get_info()[0] // 4 if device == "cuda" else COPIED[device]
    size = min(COPIED[device], room)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _seconds(work: Callable[[], object], device: str) -> float:
    """Returns the seconds of the best call, the device waited for after each: this is to be a limit."""
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    work()
    wait()
    calls: list[float] = []
    while len(calls) < MIN_CALLS or sum(calls) < SECONDS:
        started = time.perf_counter()
        work()
        wait()
        calls.append(time.perf_counter() - started)
    return min(calls)


def count_work(model: nn.Module, size: int) -> Work:
    """Counts the work of a network over uint8 images [N, size, size, 3], in eval mode on the CPU.

    What two images cost more than one is the image's, the rest is the weights'.
    """
    one, two = (_counted(model, torch.zeros((n, size, size, 3), dtype=torch.uint8)) for n in (1, 2))
    activations = float(two.values - one.values)
    return Work(float(two.flops - one.flops), activations, one.values - activations)


@torch.no_grad()  # in inference mode a linear layer would not show as the product that it is
def _counted(model: nn.Module, images: torch.Tensor) -> "_Counter":
    counter = _Counter()
    with counter:
        model(images)
    return counter


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the operations of FLOPS, and the values that those operators read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
            self.values += sum(
                leaf.numel() for leaf in tree_leaves((args, out)) if isinstance(leaf, torch.Tensor)
            )
        return out
