"""The table of out-of-fold scores that ends a run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from isic import schema
from isic.layout import ALL, BEST_CHECKPOINT, OOF_FILE, fold_dir
from isic.metrics import pauc, roc_auc
from isic.tables import read_parquet
from train.plots import ROC_FILE, draw_roc

FoldScores = tuple[float, float, float | None]
"""pAUC, AUC and mean Dice."""


def print_scores(run: Path, num_folds: int) -> None:
    """Print the out-of-fold scores per fold, their mean and the pooled ones; draw ROC curves."""
    # Both summaries: the mean of a partial AUC over folds is not the pooled value.
    paths = [fold_dir(run, fold) / OOF_FILE for fold in range(num_folds)]
    tables = {}
    for path in paths:
        if path.is_file():
            table = read_parquet(path)
            tables[str(table["fold"][0])] = table
    if not tables:
        return
    print("\nscores of best_model.pth on all held-out rows")
    print(f"{'fold':>8} {'rows':>8} {'positive':>8} {'pAUC':>8} {'AUC':>8} {'Dice':>8}")
    scores = [_print_row(fold, table) for fold, table in tables.items()]
    curves = {f"fold {fold}": table for fold, table in tables.items()}
    if len(tables) > 1:
        _print_mean(scores)
        curves["pooled"] = pl.concat(tables.values(), how="diagonal")
        _print_row("pooled", curves["pooled"])
    draw_roc(run / ROC_FILE, curves)
    print(f"\ncheckpoints in {run}, ROC curves in {ROC_FILE}")


def without_score(run: Path) -> str:
    """Return the line that ends a run of `--fold all`."""
    checkpoint = fold_dir(run, ALL) / BEST_CHECKPOINT
    return f"\nfold {ALL}: no score: every row was trained on; checkpoint: {checkpoint}"


def _print_row(name: str, oof: pl.DataFrame) -> FoldScores:
    target = oof[schema.TARGET]
    logit = oof["logit"]
    score = pauc(target, logit)
    auc = roc_auc(target, logit)
    dice = _mean(oof["dice"].to_list()) if "dice" in oof.columns else None
    print(f"{name:>8} {len(oof):8} {target.sum():8} {score:8.4f} {auc:8.4f} {_dice_text(dice)}")
    return score, auc, dice


def _print_mean(scores: Sequence[FoldScores]) -> None:
    score = np.mean([row[0] for row in scores])
    auc = np.mean([row[1] for row in scores])
    dice = _mean([row[2] for row in scores])
    print(f"{'mean':>8} {'':>17} {score:8.4f} {auc:8.4f} {_dice_text(dice)}")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _dice_text(dice: float | None) -> str:
    return f"{'-':>8}" if dice is None else f"{dice:8.4f}"
