"""Occlusion maps: the change of a network's logit if a part of the image is hidden.

Zeiler and Fergus 2014, "Visualizing and understanding convolutional networks", section 4.2. The
networks only have to run, so every engine will do, in any precision.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from infer.embedding.embedder import finished
from infer.embedding.given_images import GivenImage
from infer.embedding.image_embedder import ImageEmbedder
from infer.embedding.settings import BATCH_CPU
from infer.engines import IN_FLIGHT, Engine, Pending
from isic.layout import Fold
from isic.preprocess import Pixels
from isic.runtime.errors import UserError, did_you_mean

GRID = 7
"""Patches along a side: a lesion fills several of them in most crops."""
Fill = Literal["mean", "blur"]
"""Content of a hidden patch: the image's mean colour, or the blurred image."""

Float32s = NDArray[np.float32]


def occlusion_map(
    network: ImageEmbedder | Engine,
    images: Iterable[GivenImage] | Pixels,
    *,
    fill: Fill = "mean",
    folds: Sequence[Fold] | None = None,
    batch_size: int | None = None,
) -> Float32s:
    """Return [N, 7, 7] float32 the drop of each image's logit if a patch of it is hidden.

    A patch with a high value makes the lesion look malignant to the network; one with a negative
    value makes it look benign. Each image takes 50 runs of every network. Views of test-time
    augmentation that are not inside the artifact are left out.

    Args:
        network: an embedder, or an engine.
        images: N images as `ImageEmbedder.embed` takes them; for an engine uint8 [N, S, S, 3] of
            the size that its networks take.
        fill: content of a hidden patch, `mean` for the image's mean colour, or `blur` for the
            blurred image.
        folds: the folds whose logits are averaged; all that are loaded if None.
        batch_size: images per call of the engine; that of the embedder, or 64, if None.

    Raises:
        UserError: no image, one that cannot be used, or logits that are not finite.
    """
    if isinstance(network, Engine):
        return occlude(network, _checked(images), fill, folds, batch_size or BATCH_CPU).drops
    pixels = network.decode(images)
    with network.in_use():
        size = batch_size or network.images_per_batch
        return occlude(network.engine, pixels, fill, folds, size).drops


def _checked(images: object) -> Pixels:
    """Return the images of an engine. Raise UserError if they are no pixels of one size."""
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4:
        return images
    raise UserError(
        "an engine takes an array uint8 [N, S, S, 3]; give one, or an embedder in place of the "
        "engine"
    )


@dataclass(frozen=True, eq=False)
class Occluded:
    """The logits of N images, and their drops."""

    logits: Float32s
    """[N] of the whole images, the mean over the folds."""
    drops: Float32s
    """[N, 7, 7] the logit of the whole image less that of the image without a patch."""


def occlude(
    engine: Engine,
    images: Pixels,
    fill: Fill = "mean",
    folds: Sequence[Fold] | None = None,
    batch_size: int = BATCH_CPU,
) -> Occluded:
    """Return the logits and drops of images uint8 [N, S, S, 3]; otherwise as `occlusion_map`."""
    if fill not in FILLS:
        raise UserError(f'fill is "{fill}", {did_you_mean(fill, get_args(Fill))}')
    if not len(images):
        raise UserError("there are no images; give at least one")
    variants = (variant for image in images for variant in hide_patches(image, fill))
    logits = np.concatenate(list(_logits(engine, variants, folds, batch_size)))
    if not np.isfinite(logits).all():
        raise UserError("the engine returns logits that are not finite; use another precision")
    logits = logits.reshape(len(images), 1 + GRID * GRID)
    drops = logits[:, :1] - logits[:, 1:]
    return Occluded(logits[:, 0], drops.reshape(-1, GRID, GRID))


def hide_patches(image: Pixels, fill: Fill) -> Iterator[Pixels]:
    """Yield an image uint8 [S, S, 3], then its copies without one patch each, row by row."""
    yield image
    hidden = FILLS[fill](image)
    edges = np.linspace(0, len(image), GRID + 1).round().astype(int).tolist()
    spans = [slice(*pair) for pair in pairwise(edges)]
    for rows in spans:
        for columns in spans:
            copy = image.copy()
            copy[rows, columns] = hidden[rows, columns]
            yield copy


def _mean_colour(image: Pixels) -> Pixels:
    colour = image.mean(axis=(0, 1)).round().astype(np.uint8)
    return np.broadcast_to(colour, image.shape)


def _blurred(image: Pixels) -> Pixels:
    # As wide as a patch, so that no structure of one is left.
    return np.asarray(cv2.GaussianBlur(image, (0, 0), len(image) / GRID), np.uint8)


WITHOUT_HEAD = "a backbone without a lesion head has no logit to explain; give a trained network"
FILLS = {"mean": _mean_colour, "blur": _blurred}


@dataclass(frozen=True)
class Batch:
    """Images that the engine works on."""

    pending: Pending

    def logits(self) -> Float32s:
        """Wait for the batch and return [M] the mean of the folds' logits."""
        by_fold = []
        for _, *logits in self.pending.result().values():
            if not logits:
                raise UserError(WITHOUT_HEAD)
            by_fold.append(logits[0][:, 0])
        return np.asarray(np.mean(by_fold, axis=0, dtype=np.float32))


def _logits(
    engine: Engine, images: Iterator[Pixels], folds: Sequence[Fold] | None, batch_size: int
) -> Iterator[Float32s]:
    in_flight: deque[Batch] = deque()
    with finished(in_flight):
        while batch := list(islice(images, batch_size)):
            in_flight.append(Batch(engine.submit(np.stack(batch), folds)))
            if len(in_flight) == IN_FLIGHT:
                yield in_flight.popleft().logits()
        while in_flight:
            yield in_flight.popleft().logits()
