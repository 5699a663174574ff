"""The engine formats as data. A new one is a row here and the engine module that it names.

`export/formats.py` adds a row of the same name with the builder.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
"""The types that engines compute in."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class EngineFormat:
    """One format that a manifest can name, and the library that runs it."""

    title: str
    """The library's name in messages."""
    module: str
    """The module with `create(path, manifest, device)` and `unavailable_reason(format, device)`."""
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
    portable: bool = False
    """Artifacts can be built without the GPU they are for, and are checked where they run."""
    synthetic: bool = False
    """It runs no network, so it is not exported and the doctor does not try it."""


ENGINE_FORMATS = {
    "onnx": EngineFormat(
        "ONNX Runtime",
        "infer.engines.onnxruntime",
        suffix=".onnx",
        devices=("cpu", "cuda"),
        packages=("onnxruntime-gpu", "onnxruntime"),
        any_device=True,
    ),
    "aoti": EngineFormat(
        "AOTInductor",
        "infer.engines.aoti",
        suffix=".pt2",
        devices=("cpu", "cuda"),
        packages=("torch",),
    ),
    "tensorrt": EngineFormat(
        "TensorRT",
        "infer.engines.tensorrt",
        suffix=".plan",
        devices=("cuda",),
        packages=("tensorrt", "cuda-bindings"),
        extra="tensorrt",
    ),
    "tensorrt_rtx": EngineFormat(
        "TensorRT-RTX",
        "infer.engines.tensorrt",
        suffix=".plan",
        devices=("cuda",),
        packages=("tensorrt_rtx", "cuda-bindings"),
        extra="tensorrt_rtx",
        portable=True,
    ),
    "null": EngineFormat(
        "no network", "infer.engines.null", suffix=".null", devices=("cpu",), synthetic=True
    ),
}


def exported_formats() -> tuple[str, ...]:
    """Returns the formats that `python -m export` makes, in their order."""
    return tuple(name for name, row in ENGINE_FORMATS.items() if not row.synthetic)


def engines_by_title() -> Iterator[tuple[str, str, str]]:
    """Yields title, format and device of each engine and device that it can run on."""
    for name in exported_formats():
        row = ENGINE_FORMATS[name]
        for device in row.devices:
            title = row.title if len(row.devices) == 1 else f"{row.title}, {device.upper()}"
            yield title, name, device


def engine_packages() -> tuple[str, ...]:
    """Returns the distributions of all engines, each once."""
    names = (package for row in ENGINE_FORMATS.values() for package in row.packages)
    return tuple(dict.fromkeys(names))
