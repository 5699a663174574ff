"""The formats that can be exported, their builders, and the tolerance of each precision."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.options import PlanOptions
from infer.engines import usual_device
from infer.formats import ENGINE_FORMATS, exported_formats
from isic.layout import Fold
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.errors import UserError, did_you_mean
from train.machine import without_bfloat16
from train.model import Classifier

CPU_BATCH_SIZES = (8, 16)
"""Batch sizes at which a CPU's artifact is checked, in addition to 1 and 2."""


@dataclass(frozen=True)
class ArtifactSpec:
    """The request for one artifact: all that decides its name and whether it is up to date."""

    config: str
    fold: Fold
    format: str
    precision: str
    device: str
    """The device that it will run on: `cpu` or `cuda`."""
    options: PlanOptions

    @property
    def facts(self) -> dict[str, Any]:
        """The request as the manifest records it; if it changes, the artifact is stale."""
        row = FORMATS[self.format]
        relevant = set(row.options)
        if self.precision in row.calibrated:
            relevant |= set(CALIBRATION_OPTIONS)
        return {
            "name": self.config,
            "fold": self.fold,
            "format": self.format,
            "precision": self.precision,
            "tta": self.options.tta,
            "device": self.device,
            "options": self.options.model_dump(mode="json", include=relevant),
        }

    @property
    def variant(self) -> tuple[str, ...]:
        """Precision and any views, in the order in which file names have them."""
        tta = self.options.tta
        return (self.precision,) if tta == "none" else (self.precision, tta)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes at which parity is checked: small ones, the usual one and the largest."""
        # Tracing may treat a batch of 1 or 2 as a constant, so both are checked.
        if self.device == "cpu":
            sizes = {1, 2, *CPU_BATCH_SIZES}
        else:
            sizes = {1, 2, self.options.opt_batch, self.options.max_batch}
        return tuple(sorted(size for size in sizes if size >= self.options.min_batch))


def no_images() -> Pixels:
    return np.empty((0, 0, 0, 3), np.uint8)


@dataclass(frozen=True)
class BuildInputs:
    """A network and all else that a builder needs to export it."""

    model: Classifier
    """In eval mode on the CPU."""
    preprocess: PreprocessSpec
    cache_dir: Path
    """Folder for files that the folds of a config share, such as kernel timings."""
    calibration: Callable[[], Pixels] = no_images
    """Reads images uint8 [R, size, size, 3]; called only for calibrated precisions."""
    aux: tuple[str, ...] = ()
    """Names of the auxiliary targets."""

    @property
    def size(self) -> int:
        return self.preprocess.size


def file_name(spec: ArtifactSpec) -> str:
    name: str = _builder(spec.format).file_name(spec)
    return name


def build_artifact(spec: ArtifactSpec, inputs: BuildInputs, path: Path) -> Mapping[str, Any]:
    """Write an artifact to `path` and return additional fields of its manifest."""
    fields: Mapping[str, Any] = _builder(spec.format).build(spec, inputs, path)
    return fields


def _builder(name: str) -> Any:
    module = FORMATS[name].builder
    assert module is not None
    return import_module(module)


def offered_precisions(name: str, device: str) -> tuple[str, ...]:
    """Return a format's precisions on a device, the default one first.

    Those that this machine's GPU lacks are omitted.
    """
    precisions = FORMATS[name].precisions[device]
    # A portable artifact is for other GPUs than this machine's.
    if device == "cpu" or FORMATS[name].portable or gpu_without_bfloat16() is None:
        return precisions
    return tuple(precision for precision in precisions if precision != "bf16")


CALIBRATION_OPTIONS = ("calibration_images",)
"""Additional options of a calibrated precision."""

FORMATS = {name: ENGINE_FORMATS[name] for name in exported_formats()}
"""The formats that can be exported."""


@dataclass(frozen=True)
class Tolerance:
    """The largest accepted difference between an artifact and its checkpoint in float32."""

    min_cosine: float
    """Of each image's features."""
    max_logit_error: float
    """Of each logit, also of an auxiliary target, divided by its standard deviation over images if
    that is over 1, and of each probability of a mask."""
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


def build_device(name: str, device: str) -> str:
    """Return the device that a format is built for: `device`, if the format runs there."""
    devices = FORMATS[name].devices
    if device == "auto" and len(devices) > 1:
        device = usual_device(name)
    return device if device in devices else devices[0]


def check_options(options: PlanOptions, formats: Collection[str]) -> None:
    """Raise UserError for a flag that only another format than the requested ones follows."""
    for option, name in options_of_one_format():
        if getattr(options, option) and name not in formats:
            raise UserError(
                f"--{option} is for --formats {name} only; leave it out, or export that format too"
            )


def options_of_one_format() -> Iterator[tuple[str, str]]:
    """Yield the flags that are off by default and that a single format follows, with its name."""
    for option, field in PlanOptions.model_fields.items():
        formats = [name for name, row in FORMATS.items() if option in row.options]
        if len(formats) == 1 and not field.default:
            yield option, formats[0]


def find_formats(
    names: tuple[str, ...], precisions: tuple[str, ...], device: str
) -> list[tuple[str, str]]:
    """Return each format with each requested precision that it offers.

    Args:
        precisions: each format's default one if empty.
        device: `cpu`, `cuda` or `auto`.

    Raises:
        UserError: there is no such format or precision, a format offers none of the precisions, or
            no format offers one of them.
    """
    for name in names:
        if name not in FORMATS:
            raise UserError(f'--formats: no format "{name}", {did_you_mean(name, FORMATS)}')
    for precision in precisions:
        if precision not in TOLERANCES:
            hint = did_you_mean(precision, TOLERANCES)
            raise UserError(f'--precision: no precision "{precision}", {hint}')
    chosen = []
    for name in names:
        for precision in _chosen_precisions(name, precisions, build_device(name, device)):
            chosen.append((name, precision))
    unused = set(precisions) - {precision for _, precision in chosen}
    if unused:
        raise UserError(f"--precision {min(unused)}: {', '.join(names)} does not offer it here")
    return chosen


def _chosen_precisions(name: str, precisions: tuple[str, ...], device: str) -> list[str]:
    offered = offered_precisions(name, device)
    # Reported first: the reason is this machine, and not the format.
    if (
        "bf16" in precisions
        and "bf16" in FORMATS[name].precisions[device]
        and "bf16" not in offered
    ):
        raise UserError(f"--precision bf16: {gpu_without_bfloat16()}; use fp16 or fp32")
    if not precisions:
        return [offered[0]]
    wanted = [precision for precision in precisions if precision in offered]
    if not wanted:
        raise UserError(
            f"--precision {','.join(precisions)}: {name} on {device} offers {', '.join(offered)}; "
            "choose one of these"
        )
    return wanted
