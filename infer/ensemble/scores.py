"""How good out-of-fold scores are: pooled, by fold, and among each patient's own lesions."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from infer.ensemble.artifact import MANIFEST
from isic.config import Settings
from isic.errors import UserError
from isic.files import read_json
from isic.metrics import pauc, roc_auc, top_k_sensitivity

Scores = NDArray[np.float64]

FILE = "scores.json"


class ScoresSettings(Settings):
    """Settings of `infer scores`."""

    output_dir: Path = Field(Path("outputs/ensemble"), description="folder with ensembles in it")


def show(settings: ScoresSettings) -> None:
    """Prints the out-of-fold scores of every ensemble in a folder, the lowest pAUC first."""
    blends = {
        path.parent.name: read_json(path)["scores"]
        for path in settings.output_dir.glob(f"*/{MANIFEST}")
    }
    if not blends:
        raise UserError(
            f"{settings.output_dir} holds no finished ensemble; run `python -m infer fit` first"
        )
    print(table(dict(sorted(blends.items(), key=lambda item: item[1]["pauc"]))))


def summarise(
    target: NDArray[np.integer], score: Scores, fold: NDArray[np.integer], patient: NDArray[np.str_]
) -> dict[str, Any]:
    """Scores out-of-fold predictions.

    pAUC is not additive: the value over all rows pooled and the mean over folds differ, so both are given.

    Args:
        target, score, fold, patient: [N] each.

    Returns:
        `pauc`, `auc` and `top_15_sensitivity` pooled; `pauc_by_fold` (None for a fold with one class), their
        `pauc_mean` and `pauc_std` (of a sample, None under two folds).

    Raises:
        UserError: one class only, or a score that is not finite.
    """
    folds = np.unique(fold)
    by_fold = [_pauc_or_none(target[fold == k], score[fold == k]) for k in folds]
    known = [value for value in by_fold if value is not None]
    return {
        "pauc": pauc(target, score),
        "auc": roc_auc(target, score),
        "top_15_sensitivity": top_k_sensitivity(target, score, patient),
        "pauc_by_fold": by_fold,
        "pauc_mean": float(np.mean(known)) if known else None,
        "pauc_std": float(np.std(known, ddof=1)) if len(known) > 1 else None,
    }


def _pauc_or_none(target: NDArray[np.integer], score: Scores) -> float | None:
    return pauc(target, score) if target.min() < target.max() else None


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Returns the summaries as lines of text, one a row, under a heading."""
    width = max(len(name) for name in rows)
    heading = f"{'':{width}}  pAUC pooled  mean of folds ± std     AUC  top-15"
    return "\n".join(
        [heading, *(_line(name.ljust(width), summary) for name, summary in rows.items())]
    )


def _line(name: str, summary: dict[str, Any]) -> str:
    mean, std = (summary[key] for key in ("pauc_mean", "pauc_std"))
    folds = (
        f"{mean:.4f}" + (f" ± {std:.4f}" if std is not None else "") if mean is not None else "-"
    )
    return f"{name}  {summary['pauc']:11.4f}  {folds:>19}  {summary['auc']:.4f}  {summary['top_15_sensitivity']:6.3f}"
