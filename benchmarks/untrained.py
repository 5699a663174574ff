"""Untrained networks of configs and their artifacts: speed and size need no training."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.baselines import Features
from benchmarks.settings import ALL
from export.formats import ArtifactSpec, BuildInputs, build_artifact, build_device, file_name
from export.options import PlanOptions
from isic import schema
from isic.dataset import Dataset
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.config import CONFIG_DIR
from isic.runtime.errors import UserError, did_you_mean
from train.auxiliary import manifest_of_targets
from train.config import TrainSettings, load_settings
from train.model import Classifier, create_model, preprocess_spec

MAX_BATCH = 16
"""Default largest batch of an artifact."""
NUM_CALIBRATION = 32
"""Images for calibration of int8 and fp8."""
LAYER_SCALE = 0.5
SCALE_NAMES = (".gamma", ".gamma_1", ".gamma_2")


@dataclass(frozen=True)
class UntrainedModel:
    """A network with reproducible random weights, in eval mode on the CPU."""

    config: str
    """A name in configs/ or a path, as given."""
    settings: TrainSettings
    model: Classifier
    spec: PreprocessSpec

    @property
    def manifest(self) -> dict[str, Any]:
        """The fields of a checkpoint's manifest that an engine needs."""
        stride = self.model.mask_stride
        return {
            "name": self.settings.name,
            "fold": 0,
            "num_features": self.model.num_features,
            "preprocess": self.spec.model_dump(mode="json"),
            **manifest_of_targets(self.settings.aux),
            **({"mask_stride": stride} if stride else {}),
        }


@dataclass(frozen=True)
class Artifact:
    """An exported network and the time to build it."""

    path: Path
    manifest: dict[str, Any]
    seconds: float
    target: ArtifactSpec

    @property
    def megabytes(self) -> float:
        return self.path.stat().st_size / 1e6


def config_name(config: str) -> str:
    """Return the name of a config's run. Raise UserError for an unknown config."""
    return load_settings(TrainSettings, {"config": config}).name


def create_untrained(config: str) -> UntrainedModel:
    """Build the network of a config. Raise UserError for an unknown config."""
    # The same weights in every process that builds this network.
    torch.manual_seed(0)
    settings = load_settings(TrainSettings, {"config": config, "pretrained": False})
    model = create_model(settings, pretrained=False).eval()
    _raise_layer_scales(model)
    return UntrainedModel(config, settings, model, preprocess_spec(settings))


def _raise_layer_scales(model: nn.Module) -> None:
    """Set layer scales to the size that they have after training."""
    # They start near zero, so that the residual branches would not affect the parity check.
    for name, parameter in model.named_parameters():
        if name.endswith(SCALE_NAMES):
            nn.init.constant_(parameter, LAYER_SCALE)


def target_of(
    untrained: UntrainedModel, format_name: str, precision: str, device: str, max_batch: int
) -> ArtifactSpec:
    """Return the request for an artifact that is optimised for its largest batch."""
    return ArtifactSpec(
        config=untrained.settings.name,
        fold=0,
        format=format_name,
        precision=precision,
        device=build_device(format_name, device),
        options=PlanOptions(opt_batch=max_batch, max_batch=max_batch),
    )


def export_untrained(
    untrained: UntrainedModel,
    format_name: str,
    precision: str,
    folder: Path,
    device: str = "auto",
    max_batch: int = MAX_BATCH,
    images: Pixels | None = None,
) -> Artifact:
    """Export an untrained network as `python -m export` would.

    Args:
        max_batch: the largest batch, for which the artifact is also optimised.
        images: for calibration of int8 and fp8; noise if not given.

    Raises:
        Exception: of any type, from the builder and its libraries.
    """

    def calibration() -> Pixels:
        if images is None:
            return example_images(None, untrained.spec, NUM_CALIBRATION)
        return images[:NUM_CALIBRATION]

    target = target_of(untrained, format_name, precision, device, max_batch)
    inputs = BuildInputs(untrained.model, untrained.spec, folder, calibration)
    path = folder / file_name(target)
    manifest = {**untrained.manifest, **target.facts}
    started = time.perf_counter()
    manifest |= build_artifact(target, inputs, path)
    seconds = time.perf_counter() - started
    return Artifact(path, manifest, seconds, target)


def least_cosine(left: Features, right: Features) -> float:
    """Return the least cosine between rows of two arrays [N, D]; NaN if a value is not finite."""
    a = left.astype(np.float64)
    b = right.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / norms).min())


def find_configs(names: tuple[str, ...]) -> list[str]:
    """Return config names; `all` expands to every file in configs/."""
    if ALL in names:
        return sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))
    return list(names)


def chosen(key: str, wanted: tuple[str, ...], known: list[str]) -> list[str]:
    """Return the known words that the flag `key` selects. Raise UserError for an unknown one."""
    words = (*known, ALL)
    for name in wanted:
        if name not in words:
            raise UserError(f'--{key}: no "{name}", {did_you_mean(name, words)}')
    return [name for name in known if name in wanted or ALL in wanted]


def example_images(data: Path | None, spec: PreprocessSpec, number: int) -> Pixels:
    """Return uint8 [number, size, size, 3]: a dataset's images, repeated, or noise without one."""
    if data is None:
        shape = (number, spec.size, spec.size, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return np.asarray(noise, np.uint8)
    dataset = Dataset(data)
    ids = dataset.metadata("train")[schema.ID].to_list()[:number]
    images, failed = dataset.images("train").load(ids, spec)
    if failed:
        raise UserError(
            f"{data}: {len(failed)} of {len(ids)} images cannot be read; run `python -m isic check`"
        )
    # A small dataset is repeated.
    return images[np.arange(number) % len(ids)]
