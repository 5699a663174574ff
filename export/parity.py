"""The parity gate: an artifact must say what its checkpoint says, on real images and noise, at several batch sizes."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from export.formats import Tolerance
from infer.engines import Engine
from isic.metrics import pauc
from isic.preprocess import Pixels
from train.model import Classifier

NUM_NOISE = 7
NUM_FEW = 16
"""Images that small batches are tried on; the largest batch sees them all."""
MAX_PAUC_CHANGE = 1e-3

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


class Reference:
    """What the checkpoint says in float32 of real images and of noise."""

    def __init__(
        self, model: Classifier, images: Pixels, target: NDArray[np.float32] | None = None
    ) -> None:
        """Runs the checkpoint.

        Args:
            model: in eval mode on the CPU.
            images: real ones, uint8 [R, H, W, 3]; noise is added.
            target: [R] 0 or 1, where the images have labels.
        """
        noise = np.random.default_rng(0).integers(
            0, 256, (NUM_NOISE, *images.shape[1:]), dtype=np.uint8
        )
        self.images: Pixels = np.concatenate([images, noise])
        self.outputs = run_model(model, self.images)
        self.num_real = len(images)
        self.target = target if target is not None and 0 < target.sum() < len(target) else None


@torch.inference_mode()
def run_model(model: Classifier, images: Pixels, batch_size: int = 16) -> Arrays:
    """Returns features [N, D], logits [N, 1] and any mask [N, h, w], float32, of images uint8 [N, H, W, 3]."""
    starts = range(0, len(images), batch_size)
    outputs = [model(torch.from_numpy(images[at : at + batch_size])) for at in starts]
    return tuple(torch.cat(part).numpy() for part in zip(*outputs, strict=True))


def run_engine(engine: Engine, images: Pixels, batch_size: int, with_mask: bool) -> Arrays:
    """Returns what the engine says, as `run_model` does. Raises ParityError where it cannot draw the mask."""
    if with_mask and not isinstance(engine, Draws):
        raise ParityError("the network draws masks, and this engine does not run them")
    outputs: list[Arrays] = []
    for at in range(0, len(images), batch_size):
        batch = images[at : at + batch_size]
        masks = (engine.run_mask(batch),) if with_mask and isinstance(engine, Draws) else ()
        outputs.append((*engine.run(batch), *masks))
    return tuple(np.concatenate(part) for part in zip(*outputs, strict=True))


def check_parity(
    reference: Reference, engine: Engine, tolerance: Tolerance, batch_sizes: Sequence[int]
) -> dict[str, Any]:
    """Compares an engine with its checkpoint, the largest batch on all images and smaller ones on a few.

    Returns:
        The figures by batch size (see `compare`), and of the largest batch also `rank_correlation` and `pauc_change`.

    Raises:
        ParityError: outputs of the wrong shape or dtype, not finite, too far off, or in another order.
    """
    figures: dict[str, Any] = {}
    for batch_size in sorted(batch_sizes):
        first = 0 if batch_size == max(batch_sizes) else -max(NUM_FEW, batch_size)
        expected = tuple(part[first:] for part in reference.outputs)
        actual = run_engine(engine, reference.images[first:], batch_size, len(expected) > 2)
        figures[f"batch_{batch_size}"] = figure = compare(expected, actual)
        check_figure(figure, tolerance, f"at batch {batch_size}")
    figures |= compare_order(reference, actual[1])
    check_order(figures, tolerance, reference)
    return figures


def compare(expected: Arrays, actual: Arrays) -> dict[str, float]:
    """Returns how far outputs are apart: shapes and types first, then whether all is finite, then values.

    Returns:
        `cosine`: the least of any image's features. `max_abs_error`: of the features. `max_logit_error`: in standard
        deviations of the logits where that is over 1. `max_mask_error`: of any probability, where there is a mask.

    Raises:
        ParityError: another shape or type, or values that are not finite.
    """
    for name, want, have in zip(NAMES, expected, actual, strict=False):
        if have.dtype != np.float32 or have.shape != want.shape:
            raise ParityError(
                f"{name} are {have.dtype} {list(have.shape)}, not float32 {list(want.shape)}"
            )
        if not np.isfinite(have).all():
            raise ParityError(f"{name} hold values that are not finite")
    features, other = (part[0].astype(np.float64) for part in (expected, actual))
    norms = np.linalg.norm(features, axis=1) * np.linalg.norm(other, axis=1)
    cosine = (features * other).sum(axis=1) / np.maximum(norms, 1e-30)
    errors = [float(np.abs(want - have).max()) for want, have in zip(expected, actual, strict=True)]
    errors[1] /= max(1.0, float(expected[1].std()))
    named = zip(("max_abs_error", "max_logit_error", "max_mask_error"), errors, strict=False)
    return {"cosine": float(cosine.min()), **dict(named)}


def check_figure(figure: dict[str, float], tolerance: Tolerance, where: str) -> None:
    """Raises ParityError where a figure of `compare` is beyond the tolerance."""
    if figure["cosine"] < tolerance.min_cosine:
        raise ParityError(
            f"{where} the cosine of the features is {figure['cosine']:.6f}, under {tolerance.min_cosine}"
        )
    for name in ("logit", "mask"):
        error = figure.get(f"max_{name}_error", 0.0)
        if error > tolerance.max_logit_error:
            raise ParityError(
                f"{where} a {name} is off by {error:.2g}, over {tolerance.max_logit_error}"
            )


def compare_order(reference: Reference, logits: NDArray[np.float32]) -> dict[str, float]:
    """Returns `rank_correlation` of the real images' logits, and `pauc_change` where they have labels of both kinds."""
    expected, actual = (part[: reference.num_real, 0] for part in (reference.outputs[1], logits))
    figures = {}
    if len(np.unique(expected)) > 1 and len(np.unique(actual)) > 1:
        figures["rank_correlation"] = float(spearmanr(expected, actual).statistic)
    if reference.target is not None:
        figures["pauc_change"] = pauc(reference.target, actual) - pauc(reference.target, expected)
    return figures


def check_order(figures: dict[str, Any], tolerance: Tolerance, reference: Reference) -> None:
    """Raises ParityError where the order of the logits, or the score they reach, is not the checkpoint's."""
    rank = figures.get("rank_correlation", 1.0)
    if rank < tolerance.min_rank_correlation:
        raise ParityError(
            f"the logits' rank correlation is {rank:.4f}, under {tolerance.min_rank_correlation}"
        )
    if reference.target is None:
        return
    positives = float(reference.target.sum())
    one_pair = 1 / (positives * (len(reference.target) - positives))
    allowed = max(
        MAX_PAUC_CHANGE, one_pair
    )  # a small sample cannot show less than one pair that trades places
    if abs(figures["pauc_change"]) > allowed:
        raise ParityError(f"pAUC changes by {figures['pauc_change']:+.4f}, over {allowed:.4f}")
