"""The epochs of a fold: their statistics, `history.jsonl`, and a printed line each."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isic.layout import HISTORY_FILE, Fold
from isic.runtime.errors import UserError
from isic.runtime.files import parse_json, read_text, write_text
from train import distributed
from train.plots import write_scalars
from train.targets import AUC_PREFIX


@dataclass(frozen=True)
class Validation:
    """Scores of an epoch on held-out rows: all of them, or a subset."""

    scores: Mapping[str, float]
    """As `train.predict.score` and `train.targets.target_scores` return them."""
    num_rows: int
    """Rows that the scores are of."""
    num_held_out: int
    """Rows that the fold holds out."""

    @property
    def is_complete(self) -> bool:
        return self.num_rows == self.num_held_out

    @property
    def extent(self) -> str:
        return "all" if self.is_complete else "subset"

    def describe(self) -> str:
        """Return the scores as a part of the epoch's line."""
        text = f"pAUC {self.scores['pauc']:.4f}, AUC {self.scores['auc']:.4f}, "
        for name, auc in self.scores.items():
            if name.startswith(AUC_PREFIX):
                text += f"AUC of {name.removeprefix(AUC_PREFIX)} {auc:.4f}, "
        if "dice" in self.scores:
            text += f"Dice {self.scores['dice']:.3f}, "
        if not self.is_complete:
            text += f"on {self.num_rows:,} of {self.num_held_out:,} rows, "
        return text


@dataclass
class EpochStats:
    """Losses and times of an epoch's optimizer steps."""

    losses: list[float] = field(default_factory=list)
    num_images: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    """Seconds spent waiting for batches."""
    skipped_steps: int = 0
    """Steps skipped because a float16 gradient overflowed; the loss scale is then halved."""

    def add(self, loss: float, skipped: bool) -> None:
        self.losses.append(loss)
        self.skipped_steps += skipped

    def mean_loss(self, last: int = 0) -> float | None:
        """Return the mean finite loss of the `last` steps (0: all), None if there is none."""
        finite = [loss for loss in self.losses[-last:] if math.isfinite(loss)]
        return float(np.mean(finite)) if finite else None

    def loss_text(self, last: int = 0) -> str:
        loss = self.mean_loss(last)
        return "-" if loss is None else f"{loss:.4f}"

    @classmethod
    def merge(cls, parts: list["EpochStats"]) -> "EpochStats":
        """Merge the processes of an epoch: mean loss per step, all images, the slowest's times."""
        # Each process has its own images in a step, but all processes make the same steps.
        losses: list[float] = np.mean([part.losses for part in parts], axis=0).tolist()
        return cls(
            losses,
            num_images=sum(part.num_images for part in parts),
            seconds=max(part.seconds for part in parts),
            waiting=max(part.waiting for part in parts),
            skipped_steps=parts[0].skipped_steps,
        )


def log_epoch(
    directory: Path,
    fold: Fold,
    epoch: int,
    num_epochs: int,
    stats: EpochStats,
    validation: Validation | None,
    learning_rates: Mapping[str, float],
) -> None:
    """Append an epoch to `history.jsonl` and TensorBoard, and print a line. Main process only.

    Args:
        epoch: from 1.
        validation: None if the fold holds no row out.
        learning_rates: of the epoch's last step by name, 0 for layers that are frozen.
    """
    if not distributed.is_main():
        return
    scores = validation.scores if validation else {}
    entry = {
        "fold": fold,
        "epoch": epoch,
        "loss": stats.mean_loss(),
        **scores,
        "validated": validation.extent if validation else "none",
        "validated_rows": validation.num_rows if validation else 0,
        **{f"lr_{name}": rate for name, rate in learning_rates.items()},
        "images_per_second": stats.num_images / stats.seconds,
        "waiting_share": stats.waiting / stats.seconds,
        "skipped_steps": stats.skipped_steps,
    }
    path = directory / HISTORY_FILE
    earlier = read_history(path) if path.is_file() and epoch > 1 else []
    # A resumed run may repeat an epoch that is already in the file.
    kept = [each for each in earlier if each["epoch"] < epoch]
    write_text(path, "".join(json.dumps(each) + "\n" for each in [*kept, entry]))
    # A curve of its own: a subset's score is not the fold's.
    suffix = "_subset" if entry["validated"] == "subset" else ""
    scalars = {"loss": stats.mean_loss()}
    scalars |= {f"{name}{suffix}": score for name, score in scores.items()}
    scalars |= {f"lr/{name}": rate for name, rate in learning_rates.items()}
    write_scalars(directory / "tensorboard", epoch, scalars)
    print(
        f"fold {fold} epoch {epoch}/{num_epochs}: loss {stats.loss_text()}, "
        f"{validation.describe() if validation else ''}"
        f"{entry['images_per_second']:.0f} img/s, waiting {entry['waiting_share']:.0%}",
        flush=True,
    )


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read the epochs of `history.jsonl`.

    Raises:
        UserError: it is not the history of a training run.
    """
    epochs = [parse_json(line, path) for line in read_text(path).splitlines()]
    if not all(isinstance(epoch, dict) and isinstance(epoch.get("epoch"), int) for epoch in epochs):
        raise UserError(f"{path} is not the history of a training run; restore it")
    return epochs


def last_epoch(history: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of the last epoch, 0 if there is none."""
    return int(history[-1]["epoch"]) if history else 0
