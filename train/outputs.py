"""What a run leaves behind for people and for the next step: checkpoint, scores, history, the closing table."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray

from isic import schema
from isic.files import atomic_path, sha256, versions, write_manifest, write_text
from isic.metrics import pauc, roc_auc
from train.checkpoint import BEST, LAST, save_checkpoint
from train.config import TrainSettings
from train.data import TrainData
from train.model import preprocess_spec
from train.state import TrainState, refuse_difference

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


def begin_fold(settings: TrainSettings, fold: int) -> None:
    """Clears what a former run of the fold left, but for what a resume goes on from, and writes `config.yaml`."""
    directory = settings.fold_dir(fold)
    leftovers = {OOF_FILE, BEST} | (set() if settings.resume else {LAST, HISTORY_FILE})
    for name in leftovers:
        (directory / name).unlink(missing_ok=True)
    write_text(directory / CONFIG_FILE, yaml.safe_dump(settings.model_dump(mode="json")))


def is_finished(settings: TrainSettings, fold: int) -> bool:
    """Whether the fold has its checkpoint and scores.

    Raises:
        UserError: it has, from a run with other settings.
    """
    directory = settings.fold_dir(fold)
    if not ((directory / OOF_FILE).is_file() and (directory / BEST).is_file()):
        return False
    refuse_difference(directory, yaml.safe_load((directory / CONFIG_FILE).read_text(encoding="utf-8")), settings)
    return True


def save_fold(
    directory: Path,
    state: TrainState,
    settings: TrainSettings,
    data: TrainData,
    fold: int,
    rows: NDArray[np.int64],
    logits: NDArray[np.float32],
) -> None:
    """Writes `best_model.pth`, its manifest, and last the out-of-fold scores that mark the fold as finished."""
    config = {
        "name": settings.name,
        "model": settings.model,
        "num_features": state.model.num_features,
        "fold": fold,
        "folds_digest": data.folds.digest,
        "preprocess": preprocess_spec(settings).model_dump(mode="json"),
    }
    save_checkpoint(
        directory / BEST,
        model_state_dict=state.evaluated.state_dict(),
        optimizer_state_dict=state.optimizer.state_dict(),
        best_pauc=state.best_pauc,
        epoch=state.epoch,
        config=config,
        args=settings.model_dump(mode="json"),
    )
    oof = (
        data.table[rows]
        .select(schema.ID, schema.TARGET)
        .with_columns(pl.lit(fold, dtype=pl.Int8).alias("fold"), pl.Series("logit", logits))
    )
    with atomic_path(directory / OOF_FILE) as temporary:
        oof.write_parquet(temporary)
    made_from = {"metadata_sha256": sha256(data.metadata_path), "num_rows": len(data.table)}
    write_manifest(
        directory / BEST,
        **config,
        epoch=state.epoch,
        pauc=state.best_pauc,
        made_from=made_from,
        versions=versions("torch", "timm", "albumentations", "opencv-python-headless"),
    )


def log_epoch(
    path: Path, settings: TrainSettings, fold: int, state: TrainState, stats: EpochStats, scores: dict[str, float]
) -> None:
    """Appends the epoch to `history.jsonl` and prints a line."""
    entry = {
        "fold": fold,
        "epoch": state.epoch,
        "loss": float(np.mean(stats.losses)),
        **scores,
        "images_per_second": stats.num_images / stats.seconds,
        "waiting_share": stats.waiting / stats.seconds,
        "skipped_steps": stats.skipped_steps,
    }
    earlier = path.read_text(encoding="utf-8").splitlines() if path.is_file() and state.epoch > 1 else []
    kept = [line for line in earlier if json.loads(line)["epoch"] < state.epoch]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([*kept, json.dumps(entry)]) + "\n", encoding="utf-8")
    print(
        f"fold {fold} epoch {state.epoch}/{settings.epochs}: loss {entry['loss']:.4f}, pAUC {scores['pauc']:.4f}, "
        f"AUC {scores['auc']:.4f}, {entry['images_per_second']:.0f} img/s, waiting {entry['waiting_share']:.0%}",
        flush=True,
    )


def print_scores(settings: TrainSettings) -> None:
    """Prints the out-of-fold scores of the finished folds, and of all of them pooled.

    The partial AUC is not additive: the mean over folds is not the pooled value, so both are shown.
    """
    paths = [settings.fold_dir(fold) / OOF_FILE for fold in range(settings.num_folds)]
    tables = [pl.read_parquet(path) for path in paths if path.is_file()]
    if not tables:
        return
    print(f"\n{'fold':>8} {'rows':>8} {'positive':>8} {'pAUC':>8} {'AUC':>8}")
    scores = [_print_row(str(table["fold"][0]), table) for table in tables]
    if len(tables) > 1:
        print(f"{'mean':>8} {'':>17} {np.mean(scores, axis=0)[0]:8.4f} {np.mean(scores, axis=0)[1]:8.4f}")
        _print_row("pooled", pl.concat(tables))
    print(f"\ncheckpoints in {settings.run_dir}")


def _print_row(name: str, oof: pl.DataFrame) -> tuple[float, float]:
    target, logit = oof[schema.TARGET], oof["logit"]
    score, auc = pauc(target, logit), roc_auc(target, logit)
    print(f"{name:>8} {len(oof):8} {target.sum():8} {score:8.4f} {auc:8.4f}")
    return score, auc
