"""Predictions of held-out rows, and their scores."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isic.metrics import pauc, roc_auc
from isic.runtime.arithmetic import ceil_div
from isic.runtime.errors import UserError
from train.batch import Batch, split, to_device
from train.loaders import TimedLoader
from train.losses import dice
from train.memory import fit_parts
from train.model import Classifier
from train.step import autocast


@dataclass(frozen=True)
class Predictions:
    """Predictions of N rows that the model was not trained on."""

    rows: NDArray[np.int64]
    """[N], row numbers in the training table."""
    logits: NDArray[np.float32]
    """[N]."""
    dice: NDArray[np.float32]
    """[N], Dice coefficient of the predicted mask; NaN for an image without a mask."""

    @classmethod
    def merge(cls, parts: list["Predictions"]) -> "Predictions":
        """Merge the predictions of several processes, in the table's order."""
        rows = np.concatenate([part.rows for part in parts])
        logits = np.concatenate([part.logits for part in parts])
        overlaps = np.concatenate([part.dice for part in parts])
        # Processes predict interleaved rows.
        order = np.argsort(rows)
        return cls(rows[order], logits[order], overlaps[order])


@torch.inference_mode()
def predict(
    model: Classifier,
    loader: Iterable[Batch],
    device: torch.device,
    precision: str,
    num_parts: int = 1,
    compiled: Any | None = None,
) -> Predictions:
    """Predict the loader's rows in eval mode; Dice is NaN unless the model predicts masks.

    Args:
        num_parts: parts that a batch is cut into to fit the device's memory; more if they do not.
        compiled: `model` by torch.compile, to predict with; every batch then has the same shape.

    Raises:
        UserError: a single image does not fit.
    """
    model.eval()
    forward = model if compiled is None else compiled
    rows, logits, overlaps = [], [], []
    fixed_size = 0
    # Not timed, but TimedLoader also defers interrupts while the workers start.
    for batch in TimedLoader(loader):
        # The first batch is the largest. Another size would compile the network again.
        fixed_size = max(fixed_size, len(batch.rows)) if compiled is not None else 0
        run = partial(predict_batch, forward, batch, device, precision, fixed_size)
        # Each of several processes by itself: none waits for another before the end.
        (scores, dices), num_parts = fit_parts(run, num_parts, len(batch.rows), device)
        rows.append(batch.rows)
        logits += scores
        overlaps += dices
    all_rows = torch.cat(rows)
    # The network predicts no masks.
    overlap = torch.cat(overlaps) if overlaps else torch.full((len(all_rows),), torch.nan)
    return Predictions(
        all_rows.numpy(), torch.cat(logits).float().cpu().numpy(), overlap.cpu().numpy()
    )


def predict_batch(
    forward: Any, whole: Batch, device: torch.device, precision: str, size: int, num_parts: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits [n] of each part of a batch, and the Dice [n] if the model predicts masks.

    Nothing here waits for the device.

    Args:
        forward: the model, possibly compiled.
        size: images that a whole batch is padded to; 0 for none.
    """
    logits, overlaps = [], []
    for batch in split(whole, num_parts):
        on_device = to_device(batch, device)
        num_images = len(batch.rows)
        images = pad(on_device.images, max(num_images, ceil_div(size, num_parts)))
        with autocast(device, precision):
            outputs = forward(images)
        logits.append(outputs[1][:num_images].squeeze(1))
        if len(outputs) > len(Classifier.output_names):
            overlaps.append(dice(outputs[2][:num_images], on_device.masks))
    return logits, overlaps


def pad(images: Tensor, size: int) -> Tensor:
    """Repeat the last of the images [N, ...] until there are `size`."""
    repeated = images[-1:].expand(size - len(images), *images.shape[1:])
    return torch.cat([images, repeated]) if len(repeated) else images


def score(target: NDArray[np.float32], predictions: Predictions) -> dict[str, float]:
    """Return `pauc`, `auc` and, if any of the images has a mask, the mean `dice`.

    Raises:
        UserError: a logit is not finite.
    """
    logits = predictions.logits
    if not np.isfinite(logits).all():
        raise UserError(
            "the network's logits of held-out images are not finite; lower --lr, or use "
            "--precision bf16 instead of fp16"
        )
    scores = {"pauc": pauc(target, logits), "auc": roc_auc(target, logits)}
    overlaps = predictions.dice[~np.isnan(predictions.dice)]
    if len(overlaps):
        scores["dice"] = float(overlaps.mean())
    return scores
