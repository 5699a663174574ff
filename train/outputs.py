"""What a run leaves behind for people and for the next step: checkpoint, scores, history, the closing table."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from isic import schema
from isic.dataset import refuse_dataset
from isic.folds import FILE as FOLDS_FILE
from isic.folds import fold_dirs
from isic.metrics import pauc, roc_auc
from isic.provenance import SEEN_FILE, seen_rows, write_seen
from isic.runtime import yaml12
from isic.runtime.config import read_yaml
from isic.runtime.errors import UserError
from isic.runtime.files import (
    read_text,
    refuse_foreign,
    sha256,
    versions,
    write_manifest,
    write_parquet,
    write_text,
)
from isic.tables import read_parquet
from train import distributed
from train.checkpoint import BEST, LAST, save_checkpoint
from train.config import TrainSettings
from train.data import ERRORS_FILE, TrainData
from train.model import preprocess_spec
from train.optim import learning_rates
from train.plots import ROC_FILE, draw_roc, write_scalars
from train.pretrained import FOLDER, MARK
from train.state import TrainState, refuse_difference
from train.weights import save_backbone

CONFIG_FILE, OOF_FILE, HISTORY_FILE = "config.yaml", "oof.parquet", "history.jsonl"


@dataclass
class EpochStats:
    """What an epoch says of itself."""

    losses: list[float] = field(default_factory=list)
    num_images: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    """Seconds in which the loop waited for a batch."""
    skipped_steps: int = 0
    """Optimizer steps left out because a float16 gradient overflowed; the loss scale then falls."""

    def mean_loss(self, last: int = 0) -> float | None:
        """Mean loss of the last steps, of all if 0, without those that overflowed; None where that leaves none."""
        finite = [loss for loss in self.losses[-last:] if math.isfinite(loss)]
        return float(np.mean(finite)) if finite else None

    def add(self, loss: float, skipped: bool) -> None:
        """Counts an optimizer step."""
        self.losses.append(loss)
        self.skipped_steps += skipped

    @classmethod
    def joined(cls, parts: list["EpochStats"]) -> "EpochStats":
        """Returns what several processes that learnt together say: mean losses, all images, the slowest's time."""
        losses: list[float] = np.mean([part.losses for part in parts], axis=0).tolist()
        num_images, skipped = sum(part.num_images for part in parts), parts[0].skipped_steps
        return cls(
            losses,
            num_images,
            max(part.seconds for part in parts),
            max(part.waiting for part in parts),
            skipped,
        )


@dataclass(frozen=True)
class Predictions:
    """What a model says of rows it was not trained on."""

    rows: NDArray[np.int64]
    """[N]: where they stand in the table."""
    logits: NDArray[np.float32]
    """[N]."""
    dice: NDArray[np.float32]
    """[N]: overlap with the mask, NaN where there is none."""

    @classmethod
    def joined(cls, parts: list["Predictions"]) -> "Predictions":
        """Returns the parts of several processes as one, in the table's order."""
        rows = np.concatenate([part.rows for part in parts])
        order = np.argsort(rows)
        logits, dice = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("logits", "dice")
        )
        return cls(rows[order], logits[order], dice[order])


def refuse_to_lose(settings: TrainSettings, fold: int) -> None:
    """Raises a UserError where a fold has epochs that this run would begin again, and nobody said --force."""
    directory = settings.fold_dir(fold)
    path = directory / HISTORY_FILE
    goes_on = settings.resume and (directory / LAST).is_file()
    if path.is_file() and not (settings.force or goes_on):
        done = len(read_history(path))
        raise UserError(
            f"{directory} holds {done} of {settings.epochs} epochs; go on with --resume, or start again with --force"
        )


def refuse_other_content(settings: TrainSettings, fold: int) -> None:
    """Raise a UserError if a run would replace files that no training run wrote, as its `config.yaml` would show."""
    flag = "--output_dir or --name"
    refuse_dataset(settings.run_dir, flag)
    directory = settings.fold_dir(fold)
    names = (CONFIG_FILE, HISTORY_FILE, OOF_FILE, SEEN_FILE, BEST, LAST)
    refuse_foreign((directory / name for name in names), _is_fold(directory), flag)
    is_run = any(map(_is_fold, fold_dirs(settings.run_dir).values()))
    refuse_foreign((settings.run_dir / name for name in (ROC_FILE, ERRORS_FILE)), is_run, flag)


def _is_fold(directory: Path) -> bool:
    """Whether a folder has the settings that a training run writes into it first."""
    path = directory / CONFIG_FILE
    return path.is_file() and {"model", "epochs", "split_seed"} <= set(read_yaml(path))


def begin_fold(settings: TrainSettings, data: TrainData, fold: int, resumes: bool) -> None:
    """Writes the fold plan and `config.yaml`, and clears what a former run left unless this one goes on from it.

    Nothing is written before this: what can be wrong with settings or data has been found by now.
    """
    if not distributed.is_main():
        return
    directory = settings.fold_dir(fold)
    if not (settings.run_dir / FOLDS_FILE).is_file():
        data.folds.write(settings.run_dir / FOLDS_FILE)
    for name in () if resumes else (OOF_FILE, BEST, LAST, HISTORY_FILE, SEEN_FILE):
        (directory / name).unlink(missing_ok=True)
    write_text(directory / CONFIG_FILE, yaml12.dump(settings.model_dump(mode="json")))


def is_finished(settings: TrainSettings, fold: int) -> bool:
    """Whether the fold has its checkpoint and scores, and its last epoch is in the history.

    Raises:
        UserError: it has, from a run with other settings.
    """
    directory = settings.fold_dir(fold)
    if not all(
        (directory / name).is_file() for name in (OOF_FILE, BEST, CONFIG_FILE, HISTORY_FILE)
    ):
        return False
    then = read_yaml(directory / CONFIG_FILE)
    if not {"model", "epochs"} <= set(then):
        raise UserError(
            f"{directory / CONFIG_FILE} lacks model or epochs, which training writes; restore it, "
            f"or train fold {fold} again with --force"
        )
    if last_epoch(read_history(directory / HISTORY_FILE)) < then["epochs"]:
        return False
    refuse_difference(directory, then, settings)
    return True


def save_fold(
    directory: Path,
    state: TrainState,
    settings: TrainSettings,
    data: TrainData,
    fold: int,
    held: Predictions,
) -> None:
    """Writes `best_model.pth`, its manifest, list of images, backbone and out-of-fold scores."""
    if not distributed.is_main():
        return
    learned_from = (data.fold != fold) | (settings.select_epoch == "best")
    seen = seen_rows(data.table.filter(pl.Series(learned_from)), state.weights.seen)
    write_seen(directory / SEEN_FILE, seen)
    config = {
        "name": settings.name,
        "model": settings.model,
        "num_features": state.model.num_features,
        "fold": fold,
        "folds_digest": data.folds.digest,
        "preprocess": preprocess_spec(settings).model_dump(mode="json"),
        "pretrained": state.started_from,
        MARK: sha256(directory / SEEN_FILE),
    }
    if state.model.mask_stride:
        config["mask_stride"] = state.model.mask_stride
    save_checkpoint(
        directory / BEST,
        model_state_dict=state.evaluated.state_dict(),
        optimizer_state_dict=state.optimizer.state_dict(),
        best_pauc=state.best_pauc,
        epoch=state.epoch,
        config=config,
        args=settings.model_dump(mode="json"),
    )
    made_from = {
        "metadata_sha256": sha256(data.metadata_paths[0]),
        "extra_sha256": [sha256(path) for path in data.metadata_paths[1:]],
        "num_rows": len(data.table),
    }
    write_manifest(
        directory / BEST,
        None,
        **config,
        epoch=state.epoch,
        num_threads=torch.get_num_threads(),
        pauc=state.best_pauc,
        made_from=made_from,
        versions=versions("torch", "timm", "albumentations", "opencv-python-headless"),
    )
    facts = {
        **config,
        **made_from,
        "pauc": state.best_pauc,
        "auc": roc_auc(data.target[held.rows], held.logits),
    }
    save_backbone(directory / FOLDER, state.evaluated, settings, facts)
    _write_oof(directory / OOF_FILE, data, fold, held)


def _write_oof(path: Path, data: TrainData, fold: int, held: Predictions) -> None:
    oof = (
        data.table[held.rows]
        .select(schema.ID, schema.TARGET)
        .with_columns(pl.lit(fold, dtype=pl.Int8).alias("fold"), pl.Series("logit", held.logits))
    )
    if data.rows.masks:
        oof = oof.with_columns(pl.Series("dice", held.dice, nan_to_null=True))
    write_parquet(path, oof)


def log_epoch(
    directory: Path,
    settings: TrainSettings,
    fold: int,
    state: TrainState,
    stats: EpochStats,
    scores: dict[str, float],
) -> None:
    """Appends the epoch to `history.jsonl` and prints a line.

    `lr_backbone` and `lr_head` are the rates of the epoch's last step, 0 while the backbone is frozen.
    """
    if not distributed.is_main():
        return
    path = directory / HISTORY_FILE
    entry = {
        "fold": fold,
        "epoch": state.epoch,
        "loss": stats.mean_loss(),
        **scores,
        **{f"lr_{part}": rate for part, rate in learning_rates(state.optimizer).items()},
        "images_per_second": stats.num_images / stats.seconds,
        "waiting_share": stats.waiting / stats.seconds,
        "skipped_steps": stats.skipped_steps,
    }
    earlier = read_history(path) if path.is_file() and state.epoch > 1 else []
    kept = [epoch for epoch in earlier if epoch["epoch"] < state.epoch]
    write_text(path, "".join(json.dumps(epoch) + "\n" for epoch in [*kept, entry]))
    write_scalars(directory / "tensorboard", state.epoch, {"loss": stats.mean_loss(), **scores})
    dice = f"Dice {scores['dice']:.3f}, " if "dice" in scores else ""
    print(
        f"fold {fold} epoch {state.epoch}/{settings.epochs}: loss {loss_text(stats)}, pAUC {scores['pauc']:.4f}, "
        f"AUC {scores['auc']:.4f}, {dice}{entry['images_per_second']:.0f} img/s, waiting {entry['waiting_share']:.0%}",
        flush=True,
    )


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read the epochs of `history.jsonl`, one mapping each. Raises UserError."""
    try:
        epochs = [json.loads(line) for line in read_text(path).splitlines()]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON lines ({error}); restore it") from None
    if not all(isinstance(epoch, dict) and isinstance(epoch.get("epoch"), int) for epoch in epochs):
        raise UserError(f"{path} is not the history of a training run; restore it")
    return epochs


def last_epoch(history: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of the last epoch, 0 if there is none."""
    return int(history[-1]["epoch"]) if history else 0


def print_scores(settings: TrainSettings) -> None:
    """Prints the out-of-fold scores of the finished folds, and of all of them pooled.

    The partial AUC is not additive: the mean over folds is not the pooled value, so both are shown.
    """
    paths = [settings.fold_dir(fold) / OOF_FILE for fold in range(settings.num_folds)]
    tables = [read_parquet(path) for path in paths if path.is_file()]
    if not tables:
        return
    print(f"\n{'fold':>8} {'rows':>8} {'positive':>8} {'pAUC':>8} {'AUC':>8} {'Dice':>8}")
    scores = [_print_row(str(table["fold"][0]), table) for table in tables]
    if len(tables) > 1:
        pauc_, auc, dice = (_mean([row[column] for row in scores]) for column in range(3))
        print(f"{'mean':>8} {'':>17} {pauc_:8.4f} {auc:8.4f} {_dice_text(dice)}")
        _print_row("pooled", pl.concat(tables, how="diagonal"))
    curves = {f"fold {table['fold'][0]}": table for table in tables}
    curves |= {"pooled": pl.concat(tables, how="diagonal")} if len(tables) > 1 else {}
    draw_roc(settings.run_dir / ROC_FILE, curves)
    print(f"\ncheckpoints in {settings.run_dir}, ROC curves in {ROC_FILE}")


def loss_text(stats: EpochStats, last: int = 0) -> str:
    """The mean loss as people read it."""
    loss = stats.mean_loss(last)
    return "-" if loss is None else f"{loss:.4f}"


def _print_row(name: str, oof: pl.DataFrame) -> tuple[float, float, float | None]:
    target, logit = oof[schema.TARGET], oof["logit"]
    score, auc = pauc(target, logit), roc_auc(target, logit)
    dice = _mean(oof["dice"].to_list()) if "dice" in oof.columns else None
    print(f"{name:>8} {len(oof):8} {target.sum():8} {score:8.4f} {auc:8.4f} {_dice_text(dice)}")
    return score, auc, dice


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _dice_text(dice: float | None) -> str:
    return f"{'-':>8}" if dice is None else f"{dice:8.4f}"
