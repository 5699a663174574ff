"""Engines: exported artifacts that turn uint8 images into features and logits."""

import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from infer.formats import ENGINE_FORMATS
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.errors import UserError, first_line
from isic.runtime.extras import missing_library
from isic.runtime.files import read_manifest, versions
from isic.runtime.machine import has_gpu, no_gpu_reason

Outputs = tuple[NDArray[np.floating], NDArray[np.float32]]
"""Features [N, D] float32 or float16, the type of the artifact's output, and logits [N, 1]."""


class Engine(Protocol):
    """A loaded artifact. It runs on the requested device and never falls back to another one."""

    device: str
    """`cpu` or `cuda`."""

    def run(self, images: Pixels) -> Outputs:
        """Return the outputs of RGB images uint8 [N, H, W, 3]."""
        ...


@runtime_checkable
class SupportsMask(Protocol):
    """An engine that can compute the optional output `mask`."""

    def predict_mask(self, images: Pixels) -> NDArray[np.float32]:
        """Return probabilities [N, h, w] float32 of images uint8 [N, H, W, 3]."""
        ...


@runtime_checkable
class PinnedAllocator(Protocol):
    """An engine that can allocate memory from which its device copies faster."""

    def allocate(self, shape: tuple[int, int, int, int]) -> Pixels:
        """Return an uninitialised uint8 array of this shape in page-locked memory."""
        ...


def allocator(engine: Engine) -> Callable[[tuple[int, int, int, int]], Pixels]:
    """Return the function that allocates batches for an engine."""
    return engine.allocate if isinstance(engine, PinnedAllocator) else pageable


def pageable(shape: tuple[int, int, int, int]) -> Pixels:
    """Return an uninitialised uint8 array in ordinary memory."""
    return np.empty(shape, np.uint8)


def load(path: Path, device: str = "auto") -> Engine:
    """Load an artifact with the engine that its manifest names.

    Raises:
        UserError: there is no artifact or no manifest, the manifest is of other bytes, or the
            engine does not work here.
    """
    return create(path, read_manifest(path), device)


def create(path: Path, manifest: Mapping[str, Any], device: str = "auto") -> Engine:
    """Load an artifact with a manifest that is not read from its file, as before publication."""
    name = manifest.get("format")
    if name not in ENGINE_FORMATS:
        known = ", ".join(ENGINE_FORMATS)
        raise UserError(f'{path}: no engine runs the format "{name}", known are {known}')
    engine: Engine = import_engine(name).create(path, manifest, device_of(manifest, device))
    return engine


def import_engine(name: str) -> ModuleType:
    """Return the module of a format's engine.

    Raises:
        UserError: its library is not installed, or lacks a library that it needs itself.
    """
    row = ENGINE_FORMATS[name]
    try:
        return import_module(row.module)
    except ModuleNotFoundError as error:
        reason = missing_library(error) or UserError(
            f"{error.name} is not installed; run `pip install isic-toolkit`"
        )
        raise reason from None
    except (ImportError, OSError) as error:  # the package is there, a library it needs is not
        command = f"pip install --force-reinstall {' '.join(versions(*row.packages))}"
        raise UserError(
            f"{row.title} does not load ({first_line(error)}); run `{command}`"
        ) from None


def device_of(manifest: Mapping[str, Any], device: str = "auto") -> str:
    """Return the device that an artifact runs on.

    With `auto` it is the device that the artifact was built for, or this machine's usual one if
    the format runs on any.
    """
    if device != "auto":
        return device
    if ENGINE_FORMATS[manifest["format"]].any_device:
        return usual_device(manifest["format"])
    return str(manifest.get("device", "cpu"))


@cache
def usual_device(name: str) -> str:
    """Return `cuda` if a format's engine runs there, else `cpu`, with a note if a GPU idles."""
    reason = unavailable_reason(name, "cuda")
    if reason and has_gpu():
        print(f"note: {name} runs on the CPU: {reason}", file=sys.stderr)
    return "cpu" if reason else "cuda"


def unavailable_reason(name: str, device: str) -> str | None:
    """Return why a format's engine cannot run on `cpu` or `cuda` here, None if it can.

    The sentence is `cause; fix`.
    """
    try:
        reason: str | None = import_engine(name).unavailable_reason(name, device)
    except UserError as error:
        no_gpu = no_gpu_reason() if device == "cuda" else None
        return no_gpu or str(error)  # without a GPU, installing the library is no fix
    return reason


def load_many(
    artifacts: Mapping[int, Path], manifests: Mapping[int, Mapping[str, Any]], device: str
) -> dict[int, Engine]:
    """Load the engines of several folds; all stay resident, so a batch is decoded once for all."""
    return {fold: create(path, manifests[fold], device) for fold, path in artifacts.items()}


def manifest_spec(manifest: Mapping[str, Any]) -> PreprocessSpec:
    """Return the preprocessing that an artifact was exported for."""
    return PreprocessSpec(**manifest["preprocess"])
