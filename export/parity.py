"""The parity check: outputs of an artifact and its checkpoint on real images and noise."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from export.formats import Tolerance
from infer.engines import Engine, SupportsOther
from infer.engines.contract import (
    AUX,
    CLASS_LOGITS,
    FEATURES,
    GRAPH_CONTRACT,
    LOGITS,
    MASK,
    RESULTS,
)
from isic.metrics import pauc
from isic.preprocess import Pixels
from isic.views import VIEWS, View
from train.model import Classifier

NUM_NOISE = 7
"""Noise images that are compared in addition to the real ones."""
NUM_FEW = 16
"""Images that small batches are compared on; the largest batch size is compared on all of them."""
MAX_PAUC_CHANGE = 1e-3
FIGURES = {
    FEATURES: "max_abs_error",
    LOGITS: "max_logit_error",
    AUX: "max_aux_error",
    MASK: "max_mask_error",
    CLASS_LOGITS: "max_class_error",
}
"""The name of each output's largest error."""
LIMITED = {
    LOGITS: "a logit",
    AUX: "an auxiliary logit",
    MASK: "a mask",
    CLASS_LOGITS: "a class's logit",
}
"""The outputs whose largest error is limited, in words."""
SCALED = {LOGITS, AUX, CLASS_LOGITS}
"""The outputs whose errors are divided by their standard deviation over images, if that is over 1.
"""

Arrays = tuple[NDArray[np.float32], ...]
"""The checkpoint's outputs in its order."""
EngineArrays = tuple[NDArray[np.floating], ...]
"""An engine's outputs in this order, in the types of its artifact."""


class ParityError(Exception):
    """An artifact differs from its checkpoint; the message names the output and the difference."""


class Reference:
    """The checkpoint's outputs in float32 for real images and noise."""

    def __init__(
        self,
        model: Classifier,
        images: Pixels,
        labels: NDArray[np.float32] | None = None,
        tta: str = "none",
    ) -> None:
        """Run the checkpoint on `images` and on noise.

        Args:
            model: in eval mode on the CPU.
            images: uint8 [R, H, W, 3].
            labels: [R] 0 or 1; None if unknown.
            tta: the views to average over, a key of VIEWS.
        """
        shape = (NUM_NOISE, *images.shape[1:])
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self.images: Pixels = np.concatenate([images, noise])
        self.names = model.output_names
        self.outputs = run_averaged(model, self.images, VIEWS[tta])
        self.num_real = len(images)
        # The pAUC is undefined if the labels are all the same.
        has_both_labels = labels is not None and 0 < labels.sum() < len(labels)
        self.labels = labels if has_both_labels else None


def run_averaged(model: Classifier, images: Pixels, views: Sequence[View]) -> Arrays:
    """Return the float32 means of the outputs of `run_model` over views of uint8 [N, H, H, 3]."""
    # Not by the code of the artifact's graph, which is what this is compared with.
    sums: list[NDArray[np.float32]] = []
    for turns, mirrored in views:
        turned = np.rot90(images, turns, axes=(1, 2))
        view = np.ascontiguousarray(turned[:, :, ::-1] if mirrored else turned)
        outputs = list(run_model(model, view))
        if MASK in model.output_names:
            mask = outputs[-1][:, :, ::-1] if mirrored else outputs[-1]
            outputs[-1] = np.rot90(mask, -turns, axes=(1, 2))
        sums = [a + b for a, b in zip(sums, outputs, strict=True)] if sums else outputs
    return tuple(total / np.float32(len(views)) for total in sums)


@torch.inference_mode()
def run_model(model: Classifier, images: Pixels, batch_size: int = 16) -> Arrays:
    """Return the outputs of images uint8 [N, H, W, 3], see `Classifier.output_names`."""
    batches = []
    for start in range(0, len(images), batch_size):
        batches.append(model(torch.from_numpy(images[start : start + batch_size])))
    return tuple(torch.cat(parts).numpy() for parts in zip(*batches, strict=True))


def run_engine(
    engine: Engine, images: Pixels, batch_size: int, names: Sequence[str]
) -> EngineArrays:
    """Return the engine's outputs, as `run_model` does.

    Args:
        names: of the network's outputs.

    Raises:
        ParityError: the engine cannot compute one of them.
    """
    others = [name for name in names if name not in RESULTS]
    if others and not isinstance(engine, SupportsOther):
        raise ParityError(f"the network has the output {others[0]}, and this engine does not")
    batches: list[EngineArrays] = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        outputs: EngineArrays = engine.run(batch)
        if isinstance(engine, SupportsOther):
            outputs = (*outputs, *(engine.run_other(batch, name) for name in others))
        batches.append(outputs)
    return tuple(np.concatenate(parts) for parts in zip(*batches, strict=True))


def check_parity(
    reference: Reference, engine: Engine, tolerance: Tolerance, batch_sizes: Sequence[int]
) -> dict[str, Any]:
    """Compare an engine with its checkpoint.

    Returns:
        The figures of each batch size (see `compare`), and of a network with a lesion head
        `rank_correlation` and `pauc_change` of the largest one.

    Raises:
        ParityError: an output has another shape or type, is not finite or differs too much, or
            the logits are in another order.
    """
    figures: dict[str, Any] = {}
    for batch_size in sorted(batch_sizes):
        # The largest batch size on all images, others on a few, where a wrong kernel shows.
        first = 0 if batch_size == max(batch_sizes) else -max(NUM_FEW, batch_size)
        expected = tuple(output[first:] for output in reference.outputs)
        actual = run_engine(engine, reference.images[first:], batch_size, reference.names)
        figure = compare(expected, actual, reference.names)
        check_figure(figure, tolerance, f"at batch {batch_size}")
        figures[f"batch_{batch_size}"] = figure
    if LOGITS not in reference.names:
        return figures
    # The largest batch size was the last one, so `actual` has the logits of all images.
    figures |= compare_order(reference, actual[1])
    check_order(figures, tolerance, reference)
    return figures


def compare(
    expected: Arrays, actual: EngineArrays, names: Sequence[str] = (FEATURES, LOGITS)
) -> dict[str, float]:
    """Return the differences of an engine's outputs from the checkpoint's.

    Args:
        names: of the outputs.

    Returns:
        `cosine`: the smallest of all images' features. `max_abs_error`: of the features.
        `max_logit_error`, `max_aux_error` of auxiliary targets and `max_class_error` of a
        backbone's classes, as far as there are any: divided as SCALED says.
        `max_mask_error`: of all probabilities, if there is a mask.

    Raises:
        ParityError: an output too few or too many, a type that the contract does not name, another
            shape, or values that are not finite.
    """
    if len(actual) != len(names):
        raise ParityError(f"there are {len(actual)} outputs, not {', '.join(names)}")
    for name, wanted, found in zip(names, expected, actual, strict=True):
        dtypes = GRAPH_CONTRACT[name].dtypes
        if str(found.dtype) not in dtypes or found.shape != wanted.shape:
            raise ParityError(
                f"{name} are {found.dtype} {list(found.shape)}, "
                f"not {' or '.join(dtypes)} {list(wanted.shape)}"
            )
        if not np.isfinite(found).all():
            raise ParityError(f"{name} hold values that are not finite")
    figures = {"cosine": smallest_cosine(expected[0], actual[0])}
    for name, wanted, found in zip(names, expected, actual, strict=True):
        error = np.abs(wanted - found).max(axis=0)
        if name in SCALED:
            error = error / np.maximum(1.0, wanted.std(axis=0))
        figures[FIGURES[name]] = float(error.max())
    return figures


def smallest_cosine(expected: NDArray[np.floating], actual: NDArray[np.floating]) -> float:
    """Return the smallest cosine of corresponding rows of two arrays [N, D]."""
    a = expected.astype(np.float64)
    b = actual.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / np.maximum(norms, 1e-30)
    return float(cosine.min())


def check_figure(figure: dict[str, float], tolerance: Tolerance, where: str) -> None:
    """Raise ParityError if a figure of `compare` is beyond the tolerance."""
    if figure["cosine"] < tolerance.min_cosine:
        raise ParityError(
            f"{where} the cosine of the features is {figure['cosine']:.6f}, under "
            f"{tolerance.min_cosine}"
        )
    for name, words in LIMITED.items():
        error = figure.get(FIGURES[name], 0.0)
        if error > tolerance.max_logit_error:
            raise ParityError(
                f"{where} {words} is off by {error:.2g}, over {tolerance.max_logit_error}"
            )


def compare_order(reference: Reference, logits: NDArray[np.floating]) -> dict[str, float]:
    """Return `rank_correlation` and `pauc_change` of the real images' logits [N, 1].

    The first is absent if all logits are equal, the second if there are no labels.
    """
    expected = reference.outputs[1][: reference.num_real, 0]
    actual = logits[: reference.num_real, 0]
    figures = {}
    if len(np.unique(expected)) > 1 and len(np.unique(actual)) > 1:
        figures["rank_correlation"] = float(spearmanr(expected, actual).statistic)
    if reference.labels is not None:
        figures["pauc_change"] = pauc(reference.labels, actual) - pauc(reference.labels, expected)
    return figures


def check_order(figures: dict[str, Any], tolerance: Tolerance, reference: Reference) -> None:
    """Raise ParityError if the order of the logits, or the pAUC they reach, have changed."""
    rank = figures.get("rank_correlation", 1.0)
    if rank < tolerance.min_rank_correlation:
        raise ParityError(
            f"the logits' rank correlation is {rank:.4f}, under {tolerance.min_rank_correlation}"
        )
    if reference.labels is None:
        return
    # In a small sample the smallest possible change, one pair that swaps, can exceed the limit.
    positives = float(reference.labels.sum())
    one_pair = 1 / (positives * (len(reference.labels) - positives))
    allowed = max(MAX_PAUC_CHANGE, one_pair)
    if abs(figures["pauc_change"]) > allowed:
        raise ParityError(f"pAUC changes by {figures['pauc_change']:+.4f}, over {allowed:.4f}")


def worst_figures(parity: dict[str, Any]) -> dict[str, float]:
    """Return the worst figures of `check_parity` over all batch sizes, nan for one that is absent.

    `max_logit_error` of a backbone is that of its classes.
    """
    figures = [figure for name, figure in parity.items() if name.startswith("batch_")]
    keys = (FIGURES[LOGITS], FIGURES[CLASS_LOGITS])
    errors = [figure[key] for figure in figures for key in keys if key in figure]
    return {
        "cosine": min(figure["cosine"] for figure in figures),
        "max_logit_error": max(errors, default=float("nan")),
        "rank_correlation": parity.get("rank_correlation", float("nan")),
    }
