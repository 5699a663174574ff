"""Networks of a config with fresh weights, and their artifacts: speed and size need no training."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.formats import FORMATS, ArtifactSpec, BuildInputs, build_device
from export.options import PlanOptions
from isic import schema
from isic.dataset import Dataset
from isic.images import decode_pool
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.config import CONFIG_DIR
from isic.runtime.errors import UserError, did_you_mean
from train.config import TrainSettings, load_settings
from train.model import Classifier, create_model, preprocess_spec

ALL = "all"
LARGEST = 16
"""Batch that artifacts are built for where nobody says."""
NUM_CALIBRATION = 32
"""Images that int8 and fp8 are calibrated on."""
LAYER_SCALE = 0.5
SCALE_NAMES = (".gamma", ".gamma_1", ".gamma_2")


Features = NDArray[np.float32]


@dataclass(frozen=True)
class Fresh:
    """A network with random weights, the same ones every time, in eval mode on the CPU."""

    config: str
    """As it was asked for: a name in configs/ or a path."""
    settings: TrainSettings
    model: Classifier
    spec: PreprocessSpec

    @property
    def manifest(self) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return {
            "name": self.settings.name,
            "fold": 0,
            "num_features": self.model.num_features,
            "preprocess": self.spec.model_dump(mode="json"),
        }


@dataclass(frozen=True)
class Artifact:
    """An exported network and what building it took."""

    path: Path
    manifest: dict[str, Any]
    seconds: float
    target: ArtifactSpec

    @property
    def megabytes(self) -> float:
        return self.path.stat().st_size / 1e6


def create_fresh(config: str) -> Fresh:
    """Builds the network of a config. Raises UserError for a config that there is not."""
    torch.manual_seed(0)
    settings = load_settings(TrainSettings, {"config": config, "pretrained": False})
    model = create_model(settings, pretrained=False).eval()
    _open_branches(model)
    return Fresh(config, settings, model, preprocess_spec(settings))


def _open_branches(model: nn.Module) -> None:
    """Sets layer scales, which begin near zero, to what training makes of them, or no branch would count."""
    for name, parameter in model.named_parameters():
        if name.endswith(SCALE_NAMES):
            nn.init.constant_(parameter, LAYER_SCALE)


def build_artifact(
    fresh: Fresh,
    name: str,
    precision: str,
    folder: Path,
    device: str = "auto",
    largest: int = LARGEST,
    images: Pixels | None = None,
) -> Artifact:
    """Exports a fresh network as `python -m export` would.

    Args:
        folder: for the artifact and what its builder keeps.
        device: what it is to run on.
        largest: the batch that it is built for, and up to.
        images: what a precision is calibrated on that needs it; noise if not given.

    Raises:
        What the builder and its libraries do, of any type.
    """

    def calibration() -> Pixels:
        return (
            example_images(None, fresh.spec, NUM_CALIBRATION)
            if images is None
            else images[:NUM_CALIBRATION]
        )

    target = ArtifactSpec(
        config=fresh.settings.name,
        fold=0,
        format=name,
        precision=precision,
        device=build_device(name, device),
        options=PlanOptions(opt_batch=largest, max_batch=largest),
    )
    inputs = BuildInputs(fresh.model, fresh.spec, folder, calibration)
    path = folder / FORMATS[name].file_name(target)
    manifest = {**fresh.manifest, **target.facts}
    started = time.perf_counter()
    manifest |= FORMATS[name].build(target, inputs, path)
    seconds = time.perf_counter() - started
    return Artifact(path, manifest, seconds, target)


def least_cosine(left: Features, right: Features) -> float:
    """Returns the least cosine between the rows of two arrays [N, D]; NaN where a value is not finite."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / norms).min())


def find_configs(names: tuple[str, ...]) -> list[str]:
    """Returns config names; `all` stands for every file in configs/."""
    if ALL in names:
        return sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))
    return list(names)


def chosen(key: str, wanted: tuple[str, ...], known: list[str]) -> list[str]:
    """Returns those of some words that a flag asks for; `all` stands for each. Raises UserError for an unknown one."""
    for name in wanted:
        if name not in (*known, ALL):
            raise UserError(f'--{key}: no "{name}", {did_you_mean(name, (*known, ALL))}')
    return [name for name in known if name in wanted or ALL in wanted]


def example_images(data: Path | None, spec: PreprocessSpec, number: int) -> Pixels:
    """Returns uint8 [number, size, size, 3]: a dataset's images over and over, or noise where no dataset is given."""
    if data is None:
        noise = np.random.default_rng(0).integers(
            0, 256, (number, spec.size, spec.size, 3), dtype=np.uint8
        )
        return np.asarray(noise, np.uint8)
    dataset = Dataset(data)
    ids = dataset.metadata("train")[schema.ID].to_list()[:number]
    images = np.empty((len(ids), spec.size, spec.size, 3), np.uint8)
    with decode_pool(1) as pool:
        failed = dataset.images("train").decode(ids, spec, images, pool)
    if failed:
        raise UserError(
            f"{data}: {len(failed)} of {len(ids)} images cannot be read; run `python -m isic check`"
        )
    return images[np.arange(number) % len(ids)]
