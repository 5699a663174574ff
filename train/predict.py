"""Predictions of held-out rows, and their scores."""

from collections.abc import Iterable, Sequence
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
    aux: NDArray[np.float32]
    """[N, K], logits of the auxiliary targets."""

    @classmethod
    def merge(cls, parts: list["Predictions"]) -> "Predictions":
        """Merge the predictions of several processes, in the table's order."""
        rows = np.concatenate([part.rows for part in parts])
        logits = np.concatenate([part.logits for part in parts])
        overlaps = np.concatenate([part.dice for part in parts])
        aux = np.concatenate([part.aux for part in parts])
        # Processes predict interleaved rows.
        order = np.argsort(rows)
        return cls(rows[order], logits[order], overlaps[order], aux[order])


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
    rows: list[Tensor] = []
    parts: list[dict[str, Tensor]] = []
    fixed_size = 0
    # Not timed, but TimedLoader also defers interrupts while the workers start.
    for batch in TimedLoader(loader):
        # The first batch is the largest. Another size would compile the network again.
        fixed_size = max(fixed_size, len(batch.rows)) if compiled is not None else 0
        run = partial(
            predict_batch, forward, model.output_names, batch, device, precision, fixed_size
        )
        # Each of several processes by itself: none waits for another before the end.
        scored, num_parts = fit_parts(run, num_parts, len(batch.rows), device)
        rows.append(batch.rows)
        parts += scored
    all_rows = torch.cat(rows)
    columns = {
        name: torch.cat([part[name] for part in parts]).float().cpu().numpy() for name in parts[0]
    }
    num_rows = len(all_rows)
    return Predictions(
        all_rows.numpy(),
        columns["logits"],
        columns.get("dice", np.full(num_rows, np.nan, np.float32)),
        columns.get("aux", np.empty((num_rows, 0), np.float32)),
    )


def predict_batch(
    forward: Any,
    output_names: Sequence[str],
    whole: Batch,
    device: torch.device,
    precision: str,
    size: int,
    num_parts: int,
) -> list[dict[str, Tensor]]:
    """Return the scores of each part of a batch.

    These are `logits` [n] and, if the model has the outputs, `aux` [n, K] and the `dice` [n] of
    its masks. Nothing here waits for the device.

    Args:
        forward: the model, possibly compiled.
        output_names: of the model.
        size: images that a whole batch is padded to; 0 for none.
    """
    parts = []
    for batch in split(whole, num_parts):
        on_device = to_device(batch, device)
        num_images = len(batch.rows)
        images = pad(on_device.images, max(num_images, ceil_div(size, num_parts)))
        with autocast(device, precision):
            outputs = forward(images)
        named = {
            name: output[:num_images] for name, output in zip(output_names, outputs, strict=True)
        }
        scores = {"logits": named["logits"].squeeze(1)}
        if "aux" in named:
            scores["aux"] = named["aux"]
        if "mask" in named:
            scores["dice"] = dice(named["mask"], on_device.masks)
        parts.append(scores)
    return parts


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
