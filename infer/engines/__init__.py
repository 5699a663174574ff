"""Engines: an exported artifact that turns uint8 images into features and logits. One file an engine."""

import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.errors import UserError
from isic.runtime.files import read_manifest
from isic.runtime.machine import has_gpu

Outputs = tuple[NDArray[np.float32], NDArray[np.float32]]


class Engine(Protocol):
    """A loaded artifact. It runs on the device it was asked for or not at all."""

    device: str
    """What it runs on: `cpu` or `cuda`."""

    def run(self, images: Pixels) -> Outputs:
        """Returns features [n, D] float32 and logits [n, 1] float32 of images uint8 [n, H, W, 3] RGB."""
        ...


@runtime_checkable
class PinsMemory(Protocol):
    """An engine that can allocate memory from which its device copies faster."""

    def allocate(self, shape: tuple[int, int, int, int]) -> Pixels:
        """Returns an uninitialised uint8 array of this shape in page-locked memory."""
        ...


def allocator(engine: Engine) -> Callable[[tuple[int, int, int, int]], Pixels]:
    """Returns what allocates an uninitialised batch where the engine's device copies it from fastest."""
    return engine.allocate if isinstance(engine, PinsMemory) else pageable


def pageable(shape: tuple[int, int, int, int]) -> Pixels:
    """Returns an uninitialised batch in ordinary memory."""
    return np.empty(shape, np.uint8)


MODULES = {
    "onnx": "infer.engines.onnxruntime",
    "aoti": "infer.engines.aoti",
    "tensorrt": "infer.engines.tensorrt",
    "tensorrt_rtx": "infer.engines.tensorrt",
    "null": "infer.engines.null",
}
"""The module with `create(path, manifest, device)` for each format a manifest can name."""


def load(path: Path, device: str = "auto") -> Engine:
    """Loads an artifact with the engine that its manifest names.

    Raises:
        UserError: no artifact, no manifest, one that was written for other bytes, or the engine does not work here.
    """
    return create(path, read_manifest(path), device)


def create(path: Path, manifest: Mapping[str, Any], device: str = "auto") -> Engine:
    """Loads an artifact whose manifest is at hand (before it has its final name, say)."""
    if manifest.get("format") not in MODULES:
        raise UserError(
            f'{path}: no engine runs the format "{manifest.get("format")}", known are {", ".join(MODULES)}'
        )
    module = import_module(MODULES[manifest["format"]])
    engine: Engine = module.create(path, manifest, device_of(manifest, device))
    return engine


def device_of(manifest: Mapping[str, Any], device: str = "auto") -> str:
    """Return the device that an artifact runs on: `auto` is what it was built for.

    An ONNX file runs anywhere, so `auto` is the usual device of this machine.
    """
    if device != "auto":
        return device
    onnx = manifest["format"] == "onnx"
    return usual_device("onnx") if onnx else str(manifest.get("device", "cpu"))


@cache
def usual_device(name: str) -> str:
    """Return `cuda` if the engine of a format runs there, else `cpu`; note on stderr if a GPU idles."""
    reason = unavailable_reason(name, "cuda")
    if reason and has_gpu():
        print(f"note: {name} runs on the CPU: {reason}", file=sys.stderr)
    return "cpu" if reason else "cuda"


def unavailable_reason(name: str, device: str) -> str | None:
    """Return why the engine of a format cannot run on a device (`cpu` or `cuda`) here, None if it can."""
    try:
        engine = import_module(MODULES[name])
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except (ImportError, OSError) as error:  # it is installed, and a library that it needs is not
        return str(error).splitlines()[0]
    reason: str | None = engine.unavailable_reason(name, device)
    return reason


def load_many(
    artifacts: Mapping[int, Path], manifests: Mapping[int, Mapping[str, Any]], device: str
) -> dict[int, Engine]:
    """Loads the engines of several folds, all of which stay resident: a batch is decoded once and run by each."""
    return {fold: create(path, manifests[fold], device) for fold, path in artifacts.items()}


def manifest_spec(manifest: Mapping[str, Any]) -> PreprocessSpec:
    """Returns the preprocessing that an artifact was exported for."""
    return PreprocessSpec(**manifest["preprocess"])
