"""A synthetic engine that runs no network, to test and measure the pipeline around an engine.

Its artifact is any file with a manifest of the format `null`; the manifest's `images_per_second`
limits its speed.
"""

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infer.engines import IN_FLIGHT, Engine, Outputs
from isic import schema
from isic.folds import draw_folds
from isic.layout import FOLDS_FILE, Fold, fold_dir, fold_number
from isic.metadata import read_metadata
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.files import write_manifest

NULL_FORMAT = "null"
NULL_FILE = "model.null"
NULL_BATCH_SIZE = 256


class NullEngine(Engine):
    """Features are the first values of the image in [0, 1]; the logit is their mean plus the fold.

    The results thus show which pixels reached which fold's model. With a limited speed it is timed
    like a GPU: it computes one batch after the other while its caller goes on, and the results of
    a batch arrive when the following one could be finished.
    """

    device = "none"

    def __init__(
        self, folds: Iterable[Fold], num_features: int, images_per_second: float | None
    ) -> None:
        """Prepare the engine.

        Args:
            folds: the fold of each model.
            num_features: D, at most the number of values in an image.
            images_per_second: of one model; unlimited if None.
        """
        self.folds = tuple(folds)
        self._num_features = num_features
        self._seconds_per_image = 1 / images_per_second if images_per_second else 0.0
        self._busy_until = 0.0
        self._in_flight: deque[NullPending] = deque()

    def submit(self, images: Pixels, folds: Iterable[Fold] | None = None) -> "NullPending":
        while len(self._in_flight) >= IN_FLIGHT:
            self._in_flight.popleft().wait()
        chosen = self.folds if folds is None else tuple(folds)
        seconds = self._seconds_per_image * len(images) * len(chosen)
        self._busy_until = max(self._busy_until, time.perf_counter()) + seconds
        pending = NullPending(images, chosen, self._num_features, self._busy_until + seconds)
        self._in_flight.append(pending)
        return pending

    def close(self) -> None:
        """Nothing to end."""


class NullPending:
    """A batch of the null engine; the images are read when the result is asked for."""

    def __init__(
        self, images: Pixels, folds: Sequence[Fold], num_features: int, ready_at: float
    ) -> None:
        self._images = images
        self._folds = folds
        self._num_features = num_features
        self._ready_at = ready_at

    def wait(self) -> None:
        """Wait until the results would arrive."""
        time.sleep(max(self._ready_at - time.perf_counter(), 0))

    def result(self) -> dict[Fold, Outputs]:
        self.wait()
        values = self._images.reshape(len(self._images), -1)[:, : self._num_features]
        features = values.astype(np.float32) / np.float32(255)
        mean = features.mean(axis=1, keepdims=True)
        return {fold: (features, mean + np.float32(fold_number(fold))) for fold in self._folds}


def create(
    artifacts: Mapping[Fold, Path], manifests: Mapping[Fold, Mapping[str, Any]], device: str
) -> NullEngine:
    """Return the engine that manifests describe; it runs on any device."""
    folds = [manifests[key]["fold"] for key in artifacts]
    manifest, *_ = manifests.values()
    return NullEngine(folds, manifest["num_features"], manifest.get("images_per_second"))


def unavailable_reason(name: str, device: str) -> str | None:
    """Return None: it runs anywhere."""
    return None


def built_for() -> str | None:
    """Return None: it uses no CUDA."""
    return None


def write_run(
    model_dir: Path,
    metadata: Path,
    spec: PreprocessSpec,
    num_folds: int = 5,
    num_features: int = 192,
    images_per_second: float | None = None,
) -> None:
    """Write the files of an exported run: an artifact per fold, and the fold plan.

    Args:
        model_dir: its name is the config's.
        metadata: the training table that is split into folds.
        spec: the preprocessing, with the size of the images.
        num_folds: at least 2.
        num_features: D, at most the number of values in an image.
        images_per_second: of each engine; unlimited if None.
    """
    folds = draw_folds(read_metadata(metadata, [schema.TARGET]), num_folds, seed=0)
    folds.write(model_dir / FOLDS_FILE)
    for fold in range(num_folds):
        artifact = fold_dir(model_dir, fold) / NULL_FILE
        artifact.parent.mkdir(parents=True, exist_ok=True)
        # The digest of an artifact identifies it, so those of two folds must differ.
        artifact.write_bytes(f"stand-in {fold}\n".encode())
        write_manifest(
            artifact,
            format=NULL_FORMAT,
            name=model_dir.name,
            fold=fold,
            folds_digest=folds.digest,
            num_features=num_features,
            preprocess=spec.model_dump(mode="json"),
            batch_size=NULL_BATCH_SIZE,
            images_per_second=images_per_second,
        )
