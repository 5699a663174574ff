"""Embed images from Python: paths, bytes or arrays in, features and logits out."""

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from infer.embedding.decoders import Recipe
from infer.embedding.embedder import finished
from infer.embedding.given_images import (
    GivenImage,
    decode_images,
    name_of,
    refuse_other_types,
)
from infer.embedding.models import Models, choose_device, config_of, find_models, open_artifact
from infer.embedding.outputs import EmbeddedImages, FoldOutputs, concatenate
from infer.embedding.run_spec import usual_batch_size
from infer.embedding.settings import EmbedSettings
from infer.embedding.writer import Computed, good_rows, refuse_not_finite
from infer.engines import IN_FLIGHT, Engine, Pending, create_many
from infer.engines.contract import AUX
from infer.formats import AUTO
from isic.images import decode_pool
from isic.layout import Fold
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.config import build
from isic.runtime.errors import UserError, issue_warnings
from isic.runtime.machine import num_cores

OnError = Literal["raise", "skip"]


def load_embedder(
    path: str | PathLike[str],
    *,
    fold: Fold | None = None,
    format: str = AUTO,
    precision: str | None = None,
    device: str = "auto",
    tta: str = "none",
    batch_size: int | None = None,
    num_threads: int | None = None,
    trust: bool = False,
) -> "ImageEmbedder":
    """Load the exported networks of a training run, or one artifact.

    The keywords have the names, the values and the defaults of the flags of `infer embed`.

    Args:
        path: a run's folder, such as outputs/vit_tiny, or an exported file. A backbone of
            `export --model` has features and no logits.
        fold: the only fold to load, a number or `all`; every numbered fold if None. Not for a file.
        format: a format, a file name in each fold's folder, or `auto`, the one that this machine is
            best at. Not for a file.
        precision: precision of the artifacts; any but int8 and fp8 if None. Not for a file.
        device: `cpu`, `cuda` or `auto`.
        tta: views to average over, `none`, `flips` or `d4`.
        batch_size: images per call of the engine; 64 on a CPU and 256 on a GPU by default.
        num_threads: decoding threads; one per core by default. OpenCV's own threads are turned off
            in this process, because they would compete for the same cores.
        trust: load artifacts of native code that were not exported by this user.

    Raises:
        UserError: there is no such artifact, it does not run here, or a value is not known.
    """
    place = Path(path).expanduser()
    given = {"format": format, "precision": precision, "device": device, "tta": tta, "trust": trust}
    numbers = {"batch_size": batch_size, "num_threads": num_threads}
    if not place.exists():
        raise UserError(f"no such file or folder: {place}; give a run's folder or an artifact")
    # The settings check the values as they do those of the command.
    settings = build(EmbedSettings, {"config": place.name, **given, **numbers})
    with issue_warnings():
        models = _open_models(place, fold, settings)
        chosen = choose_device(models, settings.device, uses_ray=False)
        return ImageEmbedder(models, chosen, settings.tta, batch_size, num_threads)


def _open_models(path: Path, fold: Fold | None, settings: EmbedSettings) -> Models:
    if path.is_dir():
        return find_models(
            path,
            config_of(path, fold),
            settings.format,
            settings.precision,
            settings.tta,
            settings.device,
            fold=fold,
            trust=settings.trust,
        )
    if fold is not None or settings.format != AUTO or settings.precision:
        raise UserError(
            f"{path} is one artifact; leave out fold, format and precision, or give the folder of "
            "its run"
        )
    return open_artifact(path, settings.tta, settings.trust)


@dataclass(frozen=True)
class Batch:
    """Images that the engine works on."""

    start: int
    """Index of the first one."""
    names: list[str]
    failed: dict[int, str]
    """The reason by row."""
    pending: Pending


class ImageEmbedder:
    """Exported networks that turn images into features and logits; made by `load_embedder`.

    A context manager, because it owns threads. One call at a time may run.
    """

    def __init__(
        self,
        models: Models,
        device: str,
        tta: str = "none",
        batch_size: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Load the models.

        Args:
            models: of one run.
            device: `cpu` or `cuda`.
            tta: the views to average over.
            batch_size: images per call of the engine; that of `infer embed` if None.
            num_threads: decoding threads; one per core if None.

        Raises:
            UserError: an engine does not work here.
        """
        self._models = models
        self._tta = tta
        self._recipe = Recipe(models.spec, models.host_tta(tta))
        rows = batch_size or usual_batch_size(models, device)
        self.images_per_batch = max(1, rows // self._recipe.num_views)
        """Images per call of the engine."""
        self.engine: Engine = create_many(models.artifacts, models.manifests, device)
        """The networks, which take the pixels that `decode` returns."""
        self._pool = decode_pool(num_threads or num_cores())
        self._running = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> "ImageEmbedder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads. The embedder cannot be used afterwards."""
        self._is_closed = True
        self._pool.shutdown()
        self.engine.close()

    @property
    def name(self) -> str:
        """The name of the network, which is that of its training run."""
        return str(self._models.first_manifest["name"])

    @property
    def folds(self) -> list[Fold]:
        """The folds whose networks are loaded."""
        return self._models.folds

    @property
    def num_features(self) -> int:
        """D, the width of the features."""
        return self._models.num_features

    @property
    def aux(self) -> dict[str, str]:
        """The definitions of the auxiliary targets by name."""
        return self._models.aux

    @property
    def spec(self) -> PreprocessSpec:
        """The size of the images and how they are resized."""
        return self._models.spec

    def embed(self, images: Iterable[GivenImage], on_error: OnError = "raise") -> EmbeddedImages:
        """Return the outputs of all images.

        Args:
            images: paths, bytes of image files or arrays uint8 [height, width, 3] of RGB, also
                mixed. A generator is read batch by batch, and its images are not kept.
            on_error: `raise`, or `skip` for rows of NaN in place of images that cannot be used,
                which `failed` then lists.

        Raises:
            UserError: no images, one that cannot be used, or values that are not finite.
        """
        parts = list(self.batches(images, on_error))
        if not parts:
            raise UserError("there are no images; give at least one")
        return concatenate(parts)

    def batches(
        self, images: Iterable[GivenImage], on_error: OnError = "raise"
    ) -> Iterator[EmbeddedImages]:
        """Yield the outputs batch by batch, so that memory does not grow with the images.

        Up to three batches are computed ahead. Arguments and errors are those of `embed`; the
        indices in `failed` count all images of the call.
        """
        if on_error not in get_args(OnError):
            raise UserError(f'on_error is "{on_error}"; give raise or skip')
        _refuse_single_image(images)
        with self.in_use():
            in_flight: deque[Batch] = deque()
            with finished(in_flight):
                start = 0
                for part in _cut(images, self.images_per_batch):
                    in_flight.append(self._submit(part, start, on_error))
                    start += len(part)
                    if len(in_flight) == IN_FLIGHT:
                        yield self._collect(in_flight)
                while in_flight:
                    yield self._collect(in_flight)

    def decode(self, images: Iterable[GivenImage]) -> Pixels:
        """Return the images as the networks see them, uint8 [N, size, size, 3].

        Raises:
            UserError: one cannot be used.
        """
        _refuse_single_image(images)
        given = list(images)
        for index, image in enumerate(given):
            refuse_other_types(image, index)
        self._refuse_closed()
        pixels, failed = decode_images(given, Recipe(self.spec, "none"), self._pool)
        _refuse_failed([name_of(image, index) for index, image in enumerate(given)], failed)
        return pixels

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Refuse other calls within the block, as one thread at a time may use the engine."""
        self._refuse_closed()
        if not self._running.acquire(blocking=False):
            raise UserError(
                "this embedder is in use by another call; let that one end, or load another "
                "embedder"
            )
        try:
            yield
        finally:
            self._running.release()

    def _submit(self, images: Sequence[GivenImage], start: int, on_error: OnError) -> Batch:
        for row, image in enumerate(images):
            refuse_other_types(image, start + row)
        pixels, failed = decode_images(images, self._recipe, self._pool)
        names = [name_of(image, start + row) for row, image in enumerate(images)]
        if on_error == "raise":
            _refuse_failed(names, failed)
        return Batch(start, names, failed, self.engine.submit(pixels))

    def _collect(self, in_flight: deque[Batch]) -> EmbeddedImages:
        """Wait for the oldest batch and return its outputs."""
        batch = in_flight.popleft()
        computed = Computed(batch.names, batch.failed, batch.pending.result())
        by_fold = {fold: self._outputs(computed, fold) for fold in computed.outputs}
        failed = {batch.start + row: reason for row, reason in batch.failed.items()}
        return EmbeddedImages(by_fold, failed, self._origin)

    def _outputs(self, computed: Computed, fold: Fold) -> FoldOutputs:
        """Return one fold's outputs with rows of NaN for images that failed."""
        features, logits = good_rows(computed, fold, np.float32)
        good = [row for row in range(len(computed.ids)) if row not in computed.failed]
        refuse_not_finite([computed.ids[row] for row in good], features, logits, fold)
        values = np.full((len(computed.ids), features.shape[1] + logits.shape[1]), np.nan, "f4")
        values[good] = np.concatenate([features, logits], axis=1)
        width = features.shape[1]
        logit, *others = values[:, width:].T if logits.shape[1] else (None,)
        return FoldOutputs(values[:, :width], logit, dict(zip(self.aux, others, strict=True)))

    @property
    def _origin(self) -> dict[str, Any]:
        models = self._models
        return {
            "config": self.name,
            "folds": models.folds,
            "folds_digest": models.first_manifest.get("folds_digest"),
            "engines": models.engines,
            "checkpoints": models.checkpoints,
            "preprocess": models.spec.model_dump(mode="json"),
            "tta": self._tta,
            "num_features": models.num_features,
            **({AUX: models.aux} if models.aux else {}),
            "pretrained": models.weights,
        }

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise UserError("this embedder is closed; load it again")


def _refuse_single_image(images: Any) -> None:
    if isinstance(images, str | PathLike | bytes):
        raise UserError("images is one path or file; give a list of them")


def _refuse_failed(names: Sequence[str], failed: dict[int, str]) -> None:
    if failed:
        row, reason = min(failed.items())
        raise UserError(
            f'{names[row]} cannot be used: {reason}; leave it out, or pass on_error="skip" to embed'
        )


def _cut(images: Iterable[GivenImage], size: int) -> Iterator[list[GivenImage]]:
    """Yield lists of `size` images, the last one with the rest."""
    rest = iter(images)
    while part := list(itertools.islice(rest, size)):
        yield part
