"""The parity gate: an artifact must say what its checkpoint says, on real images and noise, at several batch sizes."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from infer.engines import Engine
from isic.preprocess import Pixels
from train.model import Classifier

BATCH_SIZES = (1, 2, 7)
NUM_NOISE = 7


NAMES = ("features", "logits", "mask")
"""Outputs in their order; the mask is there where the network draws one."""

Arrays = tuple[NDArray[np.float32], ...]


@runtime_checkable
class Draws(Protocol):
    """An engine that can run the optional output `mask`."""

    def run_mask(self, images: Pixels) -> NDArray[np.float32]:
        """Returns probabilities [n, h, w] float32 of images uint8 [n, H, W, 3]."""
        ...


class ParityError(Exception):
    """An artifact differs from its checkpoint; the message says in what and by how much."""


@torch.inference_mode()
def reference(model: Classifier, images: Pixels) -> Arrays:
    """Returns what the checkpoint says in float32 of uint8 [N, H, W, 3]: features [N, D], logits [N, 1], any mask."""
    outputs = [model(torch.from_numpy(images[at : at + 8])) for at in range(0, len(images), 8)]
    return tuple(torch.cat(part).numpy() for part in zip(*outputs, strict=True))


def run_engine(engine: Engine, images: Pixels, with_mask: bool) -> Arrays:
    """Returns what the engine says, in the order of `reference`. Raises ParityError where it cannot draw the mask."""
    if not with_mask:
        return engine.run(images)
    if not isinstance(engine, Draws):
        raise ParityError("the network draws masks, and this engine does not run them")
    return (*engine.run(images), engine.run_mask(images))


def check_parity(
    model: Classifier,
    engine: Engine,
    images: Pixels,
    min_cosine: float,
    max_logit_error: float,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> dict[str, Any]:
    """Compares an engine with its checkpoint.

    Args:
        model: the checkpoint in float32, in eval mode on the CPU.
        images: real ones, uint8 [N, H, W, 3]; as many images of noise are added.
        min_cosine: least cosine of any image's features.
        max_logit_error: largest absolute error of any logit, and of any probability of a mask.

    Returns:
        The figures by batch size: `cosine`, `max_abs_error` of the features, `max_logit_error`, any `max_mask_error`.

    Raises:
        ParityError: outputs of the wrong shape or dtype, not finite, or too far off.
    """
    noise = np.random.default_rng(0).integers(0, 256, (NUM_NOISE, *images.shape[1:]), dtype=np.uint8)
    images = np.concatenate([images, noise])
    expected = reference(model, images)
    figures = {}
    for batch_size in batch_sizes:
        starts = range(0, len(images), batch_size)
        batches = [run_engine(engine, images[at : at + batch_size], len(expected) > 2) for at in starts]
        actual = tuple(np.concatenate(part) for part in zip(*batches, strict=True))
        figures[f"batch_{batch_size}"] = figure = compare(expected, actual)
        if figure["cosine"] < min_cosine:
            raise ParityError(
                f"at batch {batch_size} the cosine of the features is {figure['cosine']:.6f}, under {min_cosine}"
            )
        if figure["max_logit_error"] > max_logit_error:
            raise ParityError(
                f"at batch {batch_size} a logit is off by {figure['max_logit_error']:.2g}, over {max_logit_error}"
            )
        if figure.get("max_mask_error", 0.0) > max_logit_error:
            raise ParityError(
                f"at batch {batch_size} the mask is off by {figure['max_mask_error']:.2g}, over {max_logit_error}"
            )
    return figures


def compare(expected: Arrays, actual: Arrays) -> dict[str, float]:
    """Returns the least cosine of any image's features and the largest absolute errors. Raises ParityError."""
    for name, want, have in zip(NAMES, expected, actual, strict=False):
        if have.dtype != np.float32 or have.shape != want.shape:
            raise ParityError(f"{name} are {have.dtype} {list(have.shape)}, not float32 {list(want.shape)}")
        if not np.isfinite(have).all():
            raise ParityError(f"{name} hold values that are not finite")
    features, other = (part[0].astype(np.float64) for part in (expected, actual))
    norms = np.linalg.norm(features, axis=1) * np.linalg.norm(other, axis=1)
    cosine = (features * other).sum(axis=1) / np.maximum(norms, 1e-30)
    errors = [float(np.abs(want - have).max()) for want, have in zip(expected, actual, strict=True)]
    named = zip(("max_abs_error", "max_logit_error", "max_mask_error"), errors, strict=False)
    return {"cosine": float(cosine.min()), **dict(named)}
