"""The artifact formats as data: how each is exported and run.

A new format is a row here, a builder module in `export/` and an engine module in `infer/engines/`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
"""The types that engines compute in."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class EngineFormat:
    """One format that a manifest can name: the library that runs it, and how it is built."""

    title: str
    """The library's name in messages."""
    module: str
    """The module with `create(artifacts, manifests, device)`, `unavailable_reason(format, device)`
    and `built_for()`, the CUDA that the library was built for."""
    suffix: str
    """Ending of the artifact's file name."""
    devices: tuple[str, ...]
    """Devices that its artifacts can run on: `cpu`, `cuda`."""
    packages: tuple[str, ...] = ()
    """Distributions that it needs; their versions are printed and recorded."""
    extra: str | None = None
    """The extra of this package that installs them; None if they always are."""
    any_device: bool = False
    """One file runs on all of its devices, not only on the one it was exported for."""
    runs_code: bool = False
    """Its artifacts hold compiled code, which loading them runs."""
    portable: bool = False
    """Artifacts can be built without the GPU they are for, and are checked on it later."""
    builder: str | None = None
    """The module of `export` with `file_name(spec)` and `build(spec, inputs, path)`; None for a
    format that runs no network, which is neither exported nor tried by the doctor."""
    precisions: Mapping[str, tuple[Precision, ...]] = field(default_factory=dict)
    """The precisions on each device, the default one first."""
    options: tuple[str, ...] = ()
    """Fields of `export.options.PlanOptions` that the builder follows."""
    calibrated: tuple[Precision, ...] = ()
    """Precisions whose scales are computed from images."""
    triton_backend: str | None = None
    """The backend of NVIDIA Triton that runs it, None if there is none."""


PROFILE_OPTIONS = (
    "min_batch",
    "opt_batch",
    "max_batch",
    "workspace_mib",
    "optimization_level",
    "cuda_graph",
)
"""Options of every TensorRT plan."""

ENGINE_FORMATS = {
    "onnx": EngineFormat(
        "ONNX Runtime",
        "infer.engines.onnxruntime",
        suffix=".onnx",
        devices=("cpu", "cuda"),
        packages=("onnxruntime-gpu", "onnxruntime"),
        any_device=True,
        builder="export.onnx_graph",
        precisions={"cpu": ("fp32", "fp16", "int8"), "cuda": ("fp16", "fp32", "bf16")},
        triton_backend="onnxruntime",
    ),
    "aoti": EngineFormat(
        "AOTInductor",
        "infer.engines.aoti",
        suffix=".pt2",
        devices=("cpu", "cuda"),
        packages=("torch",),
        runs_code=True,
        builder="export.aoti",
        precisions={"cpu": ("fp32", "bf16", "fp16"), "cuda": ("bf16", "fp16", "fp32")},
        options=("opt_batch", "max_batch", "max_autotune"),
    ),
    "tensorrt": EngineFormat(
        "TensorRT",
        "infer.engines.tensorrt",
        suffix=".plan",
        devices=("cuda",),
        packages=("tensorrt", "cuda-bindings"),
        extra="tensorrt",
        runs_code=True,
        builder="export.tensorrt",
        precisions={"cuda": ("fp16", "bf16", "fp32", "int8", "fp8")},
        options=(*PROFILE_OPTIONS, "version_compatible", "hardware_compatible"),
        calibrated=("int8", "fp8"),
        triton_backend="tensorrt",
    ),
    "tensorrt_rtx": EngineFormat(
        "TensorRT-RTX",
        "infer.engines.tensorrt",
        suffix=".plan",
        devices=("cuda",),
        packages=("tensorrt_rtx", "cuda-bindings"),
        extra="tensorrt_rtx",
        runs_code=True,
        portable=True,
        builder="export.tensorrt",
        # NVIDIA's support matrix lists int8 for weights only; these plans need activations too.
        precisions={"cuda": ("fp16", "bf16", "fp32", "fp8")},
        options=(*PROFILE_OPTIONS, "compute_capabilities"),
        calibrated=("fp8",),
    ),
    "null": EngineFormat("no network", "infer.engines.null", suffix=".null", devices=("cpu",)),
}

AUTO = "auto"
"""The name of the choice by AUTO_ORDER."""
AUTO_ORDER: Mapping[str, tuple[tuple[str, Precision], ...]] = {
    "cuda": (
        ("tensorrt", "fp16"),
        ("tensorrt_rtx", "fp16"),
        ("aoti", "bf16"),
        ("aoti", "fp16"),
        ("onnx", "fp16"),
        ("tensorrt", "bf16"),
        ("tensorrt_rtx", "bf16"),
        ("onnx", "bf16"),
        ("tensorrt", "int8"),
        ("tensorrt", "fp8"),
        ("tensorrt_rtx", "fp8"),
        ("tensorrt", "fp32"),
        ("tensorrt_rtx", "fp32"),
        ("aoti", "fp32"),
        ("onnx", "fp32"),
    ),
    "cpu": (
        ("onnx", "fp32"),
        ("aoti", "fp32"),
        ("aoti", "bf16"),
        ("aoti", "fp16"),
        ("onnx", "fp16"),
        ("onnx", "int8"),
    ),
}
"""Formats and precisions of artifacts by device, the best one first."""
ON_REQUEST: tuple[Precision, ...] = ("int8", "fp8")
"""Precisions that change scores visibly, so AUTO takes them only if they are named."""


def exported_formats() -> tuple[str, ...]:
    """Return the formats that `python -m export` makes, in their order."""
    return tuple(name for name, row in ENGINE_FORMATS.items() if row.builder)


def engines_by_title() -> Iterator[tuple[str, str, str]]:
    """Yield title, format and device of each engine and device that it can run on."""
    for name in exported_formats():
        row = ENGINE_FORMATS[name]
        for device in row.devices:
            title = row.title if len(row.devices) == 1 else f"{row.title}, {device.upper()}"
            yield title, name, device


def engine_packages() -> tuple[str, ...]:
    """Return the distributions of all engines, each once."""
    # Engines of one library share a distribution.
    names = (package for row in ENGINE_FORMATS.values() for package in row.packages)
    return tuple(dict.fromkeys(names))
