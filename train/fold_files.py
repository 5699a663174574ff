"""The files of a trained fold: settings, checkpoint, manifest, out-of-fold scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch

from isic import schema
from isic.layout import (
    BACKBONE_DIR,
    BEST_CHECKPOINT,
    CONFIG_FILE,
    FOLDS_FILE,
    HISTORY_FILE,
    LAST_CHECKPOINT,
    OOF_FILE,
    TRAINED_ON_FILE,
    Fold,
    fold_dir,
)
from isic.metrics import roc_auc
from isic.provenance import seen_rows, write_seen
from isic.runtime import yaml12
from isic.runtime.files import manifest_path, sha256, versions, write_manifest, write_text
from isic.tables import write_parquet
from train import distributed
from train.auxiliary import AuxTarget, manifest_of_targets
from train.backbone import save_backbone
from train.checkpoint import save_checkpoint
from train.config import TrainSettings
from train.predict import Predictions
from train.pretrained import TRAINED_ON_KEY
from train.rows import TrainData
from train.state import TrainState

RESULT_FILES = (
    OOF_FILE,
    BEST_CHECKPOINT,
    manifest_path(Path(BEST_CHECKPOINT)).name,
    LAST_CHECKPOINT,
    HISTORY_FILE,
    TRAINED_ON_FILE,
)
"""Files of a previous run that a fold begins without."""
CHECKPOINT_PACKAGES = ("torch", "timm", "albumentations", "opencv-python-headless")
"""Packages whose versions are in the manifest."""


def begin_fold(settings: TrainSettings, data: TrainData, fold: Fold, resumes: bool) -> None:
    """Write the fold plan and `config.yaml`, and delete a previous run's results unless resumed.

    Main process only.
    """
    # Nothing is written before this function, so that wrong settings or data leave no trace.
    if not distributed.is_main():
        return
    run = settings.run_dir
    directory = fold_dir(run, fold)
    if not (run / FOLDS_FILE).is_file():
        data.folds.write(run / FOLDS_FILE)
    if not resumes:
        for name in RESULT_FILES:
            (directory / name).unlink(missing_ok=True)
    write_text(directory / CONFIG_FILE, yaml12.dump(settings.model_dump(mode="json")))


def save_fold(
    directory: Path,
    state: TrainState,
    settings: TrainSettings,
    data: TrainData,
    fold: Fold,
    predictions: Predictions | None,
) -> None:
    """Write the checkpoint, its manifest, seen images, backbone and out-of-fold scores.

    Main process only.

    Args:
        predictions: of all held-out rows; None if the fold holds none out.
    """
    if not distributed.is_main():
        return
    # First, because checkpoint, manifest and backbone contain its digest.
    trained_on = rows_trained_on(data, fold, settings.select_epoch)
    write_seen(directory / TRAINED_ON_FILE, seen_rows(trained_on, state.weights.seen))
    config = checkpoint_config(directory, state, settings, data, fold)
    checkpoint = directory / BEST_CHECKPOINT
    pauc = state.best_pauc if predictions else None
    save_checkpoint(
        checkpoint,
        model_state_dict=state.evaluated.state_dict(),
        optimizer_state_dict=state.optimizer.state_dict(),
        best_pauc=pauc,
        epoch=state.epoch,
        config=config,
        args=settings.model_dump(mode="json"),
    )
    made_from = {
        "metadata_sha256": data.metadata_digests[0],
        "extra_sha256": data.metadata_digests[1:],
        "images_digest": data.images_digest,
        "num_rows": len(data.table),
    }
    write_manifest(
        checkpoint,
        None,
        **config,
        epoch=state.epoch,
        num_threads=torch.get_num_threads(),
        precision=settings.precision,
        pauc=pauc,
        made_from=made_from,
        versions=versions(*CHECKPOINT_PACKAGES),
    )
    scores = {}
    if predictions:
        auc = roc_auc(data.target[predictions.rows], predictions.logits)
        scores = {"pauc": pauc, "auc": auc}
        save_oof(directory / OOF_FILE, data, fold, predictions, settings.aux)
    facts = {**config, **made_from, **scores}
    save_backbone(directory / BACKBONE_DIR, state.evaluated, settings, facts)


def rows_trained_on(data: TrainData, fold: Fold, select_epoch: str) -> pl.DataFrame:
    """Return the rows that the weights of a fold depend on."""
    if select_epoch == "best":
        return data.table  # the held-out rows have chosen the epoch
    return data.table.filter(pl.Series(~data.is_held_out(fold)))


def checkpoint_config(
    directory: Path, state: TrainState, settings: TrainSettings, data: TrainData, fold: Fold
) -> dict[str, Any]:
    """Return the facts that the checkpoint and its manifest share."""
    model = state.model
    config = {
        "name": settings.name,
        "model": settings.model,
        "num_features": model.num_features,
        "fold": fold,
        "folds_digest": data.folds.digest,
        "preprocess": model.spec.model_dump(mode="json"),
        "pretrained": state.started_from,
        TRAINED_ON_KEY: sha256(directory / TRAINED_ON_FILE),
    }
    config |= manifest_of_targets(settings.aux)
    if model.mask_stride:
        config["mask_stride"] = model.mask_stride
    return config


def save_oof(
    path: Path,
    data: TrainData,
    fold: Fold,
    predictions: Predictions,
    targets: Sequence[AuxTarget],
) -> None:
    """Write the scores of the held-out rows.

    With auxiliary targets these include the logits `aux.<name>`, with masks `dice`.
    """
    rows = data.table[predictions.rows].select(schema.ID, schema.TARGET)
    oof = rows.with_columns(
        pl.lit(fold, dtype=pl.Int8).alias("fold"), pl.Series("logit", predictions.logits)
    )
    for target, logits in zip(targets, predictions.aux.T, strict=True):
        oof = oof.with_columns(pl.Series(target.key, logits))
    if data.rows.masks is not None:
        oof = oof.with_columns(pl.Series("dice", predictions.dice, nan_to_null=True))
    write_parquet(path, oof)
