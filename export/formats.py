"""The formats an export can have, as data: a new one is a row here and a module beside this one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.options import PlanOptions
from infer.engines import usual_device
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.errors import UserError, did_you_mean
from train.machine import without_bfloat16
from train.model import Classifier


def no_images() -> Pixels:
    """Returns no images at all, where nobody said which to calibrate on."""
    return np.empty((0, 0, 0, 3), np.uint8)


@dataclass(frozen=True)
class Target:
    """What one artifact is to be."""

    config: str
    fold: int
    format: str
    precision: str
    device: str
    """What it will run on: `cpu` or `cuda`."""
    spec: PreprocessSpec
    options: PlanOptions
    cache_dir: Path
    """Where builders keep what the folds of a config share."""
    calibration: Callable[[], Pixels] = no_images
    """Images [R, size, size, 3] for the precisions that are calibrated, read where one of them is built."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says was asked for; another answer makes the artifact stale."""
        kind = FORMATS[self.format]
        named = {*kind.options, *(CALIBRATION_OPTIONS if self.precision in kind.calibrated else ())}
        options = self.options.model_dump(mode="json", include=named)
        return {
            "name": self.config,
            "fold": self.fold,
            "format": self.format,
            "precision": self.precision,
            "device": self.device,
            "options": options,
        }

    @property
    def size(self) -> int:
        return self.spec.size

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batches that must all say the same: 1 and 2, that kernels are chosen for, and the largest."""
        most = (8, 16) if self.device == "cpu" else (self.options.opt_batch, self.options.max_batch)
        return tuple(sorted({batch for batch in (1, 2, *most) if batch >= self.options.min_batch}))


Builder = Callable[[Classifier, Target, Path], Mapping[str, Any]]
"""Writes the artifact of a model, in eval mode on the CPU, under a path; returns what its manifest is to say of it."""


@dataclass(frozen=True)
class Format:
    """One format and the module that builds it, with `file_name(target)` and `build(model, target, path)`."""

    module: str
    precisions: Mapping[str, tuple[str, ...]]
    """What it offers on each device it runs on, the usual one first."""
    options: tuple[str, ...] = ()
    """Fields of PlanOptions that its build follows."""
    calibrated: tuple[str, ...] = ()
    """Precisions whose scales come from images."""
    portable: bool = False
    """It is built where it cannot run; the parity gate is then left to the machine that runs it."""

    def file_name(self, target: Target) -> str:
        name: str = import_module(self.module).file_name(target)
        return name

    def offered(self, device: str) -> tuple[str, ...]:
        """Return its precisions on a device, the usual one first.

        Those that this machine's GPU lacks are left out, unless the artifact is for other GPUs.
        """
        offered = self.precisions[device]
        if device == "cpu" or self.portable or gpu_without_bfloat16() is None:
            return offered
        return tuple(precision for precision in offered if precision != "bf16")

    @property
    def build(self) -> Builder:
        builder: Builder = import_module(self.module).build
        return builder


PLAN_OPTIONS = (
    "min_batch",
    "opt_batch",
    "max_batch",
    "workspace_mib",
    "optimization_level",
    "cuda_graph",
)
"""What every TensorRT plan follows."""
CALIBRATION_OPTIONS = ("calibration_images",)
"""What a calibrated precision follows as well."""

FORMATS = {
    "onnx": Format(
        "export.onnx_graph", {"cpu": ("fp32", "fp16", "int8"), "cuda": ("fp32", "fp16", "bf16")}
    ),
    "aoti": Format(
        "export.aoti",
        {"cpu": ("fp32", "bf16", "fp16"), "cuda": ("bf16", "fp16", "fp32")},
        options=("opt_batch", "max_batch", "max_autotune"),
    ),
    "tensorrt": Format(
        "export.tensorrt",
        {"cuda": ("fp16", "bf16", "fp32", "int8", "fp8")},
        options=(*PLAN_OPTIONS, "version_compatible", "hardware_compatible"),
        calibrated=("int8", "fp8"),
    ),
    "tensorrt_rtx": Format(
        "export.tensorrt",
        # NVIDIA's support matrix lists int8 for weights alone, and these plans need activations too.
        {"cuda": ("fp16", "bf16", "fp32", "fp8")},
        options=(*PLAN_OPTIONS, "compute_capabilities"),
        calibrated=("fp8",),
        portable=True,
    ),
}


@dataclass(frozen=True)
class Tolerance:
    """How far an artifact may be from its checkpoint in float32."""

    min_cosine: float
    """Of any image's features."""
    max_logit_error: float
    """Of any logit, in standard deviations of the logits where that is over 1; and of any probability of a mask."""
    min_rank_correlation: float
    """Spearman's, of the logits of real images."""


TOLERANCES = {
    "fp32": Tolerance(0.99999, 1e-3, 0.9999),
    "fp16": Tolerance(0.999, 5e-2, 0.999),
    "bf16": Tolerance(0.995, 3e-1, 0.99),
    "int8": Tolerance(0.99, 0.5, 0.97),
    "fp8": Tolerance(0.99, 0.5, 0.97),
}


def gpu_without_bfloat16() -> str | None:
    """Return why this machine's GPU lacks bfloat16, None if it has it or there is no GPU."""
    return without_bfloat16(torch.device("cuda")) if torch.cuda.is_available() else None


def device_of(name: str, device: str) -> str:
    """Return the device that a format is built for: the given one if it has that, `auto` by what runs here."""
    offered = FORMATS[name].precisions
    if device == "auto" and len(offered) > 1:
        device = usual_device(name)
    return device if device in offered else next(iter(offered))


def find_formats(
    names: tuple[str, ...], precisions: tuple[str, ...], device: str
) -> list[tuple[str, str]]:
    """Returns each format with each of the precisions that it offers, its usual one where none is named.

    Raises:
        UserError: no such format or precision, or one that has none of the others.
    """
    for name in names:
        if name not in FORMATS:
            raise UserError(f'--formats: no format "{name}", {did_you_mean(name, FORMATS)}')
    for precision in precisions:
        if precision not in TOLERANCES:
            raise UserError(
                f'--precision: no precision "{precision}", {did_you_mean(precision, TOLERANCES)}'
            )
    chosen = []
    for name in names:
        kind, device_name = FORMATS[name], device_of(name, device)
        offered = kind.offered(device_name)
        if {"bf16"} & set(precisions) & set(kind.precisions[device_name]) - set(offered):
            raise UserError(f"--precision bf16: {gpu_without_bfloat16()}; use fp16 or fp32")
        wanted = (
            [precision for precision in precisions if precision in offered]
            if precisions
            else [offered[0]]
        )
        if not wanted:
            where = f"{name} on {device_name}"
            raise UserError(
                f"--precision {','.join(precisions)}: {where} offers {', '.join(offered)}; choose one of these"
            )
        chosen += [(name, precision) for precision in wanted]
    unused = set(precisions) - {precision for _, precision in chosen}
    if unused:
        raise UserError(f"--precision {min(unused)}: {', '.join(names)} does not offer it here")
    return chosen
