"""Engines: exported artifacts that turn uint8 images into features and logits."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from infer.formats import ENGINE_FORMATS
from isic.layout import NONE, Fold
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.errors import UserError, first_line
from isic.runtime.extras import missing_library
from isic.runtime.files import read_manifest, versions
from isic.runtime.machine import has_gpu, no_gpu_reason

Outputs = tuple[NDArray[np.floating], *tuple[NDArray[np.float32], ...]]
"""Features [N, D], float32 or float16 as the graph computes them, and logits [N, 1] float32.

The logits [N, K] float32 of auxiliary targets are third, if the graph has them. A backbone without
a lesion head returns its features only."""
IN_FLIGHT = 3
"""Batches that an engine works on at once: one copied in, one computed, one collected."""


class Pending(Protocol):
    """A batch that an engine works on."""

    def result(self) -> dict[Fold, Outputs]:
        """Wait for the batch and return its outputs by fold; the arrays are the caller's.

        Raises:
            UserError: the device failed, for example because its memory is full.
        """
        ...


class Engine(ABC):
    """Loaded artifacts by fold, all on one device. It never falls back to another device."""

    device: str
    """`cpu` or `cuda`."""
    folds: tuple[Fold, ...]

    @abstractmethod
    def submit(self, images: Pixels, folds: Iterable[Fold] | None = None) -> Pending:
        """Start to compute a batch; it is copied to the device once for all folds.

        Returns at once while fewer than IN_FLIGHT batches are not finished; otherwise it may wait
        for the oldest one. One thread at a time may submit.

        Args:
            images: RGB, uint8 [N, H, W, 3]; not to be changed before the result is there.
            folds: whose models compute it; all of them if None.
        """

    def run(self, images: Pixels) -> Outputs:
        """Return the outputs of the only model for images uint8 [N, H, W, 3]."""
        (outputs,) = self.submit(images).result().values()
        return outputs

    @abstractmethod
    def close(self) -> None:
        """Wait for unfinished batches and end the engine's threads, if it has any."""


@runtime_checkable
class SupportsOther(Protocol):
    """An engine that can compute an output of its only model that no batch's result has."""

    def run_other(self, images: Pixels, name: str) -> NDArray[np.float32]:
        """Return `mask` or `class_logits`, which the model has, of images uint8 [N, H, W, 3]."""
        ...


def load(path: Path, device: str = "auto") -> Engine:
    """Load an artifact with the engine that its manifest names.

    Raises:
        UserError: there is no artifact or no manifest, the manifest is of other bytes, or the
            engine does not work here.
    """
    return create(path, read_manifest(path), device)


def create(path: Path, manifest: Mapping[str, Any], device: str = "auto") -> Engine:
    """Load an artifact with a manifest that is not read from its file, as before publication."""
    return create_many({0: path}, {0: manifest}, device)


def create_many(
    artifacts: Mapping[Fold, Path],
    manifests: Mapping[Fold, Mapping[str, Any]],
    device: str = "auto",
) -> Engine:
    """Load the artifacts of several folds, which have one format, into one engine."""
    for fold, path in artifacts.items():
        name = manifests[fold].get("format")
        if not isinstance(name, str) or name not in ENGINE_FORMATS:
            known = ", ".join(ENGINE_FORMATS)
            raise UserError(f'{path}: no engine runs the format "{name}", known are {known}')
    manifest, *_ = manifests.values()
    module = import_engine(manifest["format"])
    engine: Engine = module.create(artifacts, manifests, device_of(manifest, device))
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


def network_command(manifest: Mapping[str, Any]) -> str:
    """Return the command that exports the network of an artifact, without flags of its format."""
    if manifest.get("fold") != NONE:
        return f"python -m export --config {manifest['name']}"
    source = manifest["pretrained"]["source"]
    flags = {
        "model": manifest["model"],
        "pretrained": "true" if source == "timm" else source,
        "image_size": manifest["preprocess"]["size"],
        "name": manifest["name"],
    }
    return " ".join(("python -m export", *(f"--{key} {value}" for key, value in flags.items())))


def manifest_spec(manifest: Mapping[str, Any]) -> PreprocessSpec:
    """Return the preprocessing that an artifact was exported for."""
    return PreprocessSpec(**manifest["preprocess"])
