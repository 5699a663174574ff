"""Metrics of out-of-fold scores: pooled, by fold, and among each patient's own lesions."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from infer.ensemble.artifact import ENSEMBLE_FILE, FORMAT_VERSION
from infer.ensemble.blends.ranks import Scores
from infer.ensemble.manifest import check_manifest
from infer.ensemble.scoring.calibration import CALIBRATION, describe_calibration
from infer.ensemble.scoring.chosen import choice_notes
from infer.ensemble.scoring.triage import format_triage
from infer.ensemble.settings import ScoresSettings
from isic.metrics import TOP_K, pauc, roc_auc, top_k
from isic.runtime.errors import UserError, warn
from isic.runtime.files import read_json


def show_scores(settings: ScoresSettings) -> None:
    """Run `infer scores`, which its settings describe."""
    blends = {}
    notes = []
    for path in settings.output_dir.glob(f"*/{ENSEMBLE_FILE}"):
        manifest = read_json(path)
        if manifest.get("format") == FORMAT_VERSION:
            check_manifest(path, manifest)
            blends[path.parent.name] = manifest["scores"]
            notes += choice_notes(path.parent.name, manifest)
        else:
            warn(f"{path.parent} was fitted by another version")
    if not blends:
        raise UserError(
            f"{settings.output_dir} holds no finished ensemble; run `python -m infer fit` first"
        )
    print(format_scores(dict(sorted(blends.items(), key=lambda item: item[1]["pauc"]))))
    for note in sorted(notes):
        print(note)


def summarise(
    target: NDArray[np.integer], score: Scores, fold: NDArray[np.integer], patient: NDArray[np.str_]
) -> dict[str, Any]:
    """Return the metrics of out-of-fold scores.

    Args:
        target, score, fold, patient: [N] each.

    Returns:
        `pauc` and `auc` pooled; `top_15_by_lesion` and `top_15_by_patient`, with the number of
        `patients_with_malignant` and, of these, `patients_of_at_most_15`, see `metrics.TopK`;
        `pauc_by_fold` (None for a fold with one class), their `pauc_mean` and `pauc_std` (of a
        sample, None under two folds).

    Raises:
        UserError: one class only, or a score that is not finite.
    """
    folds = np.unique(fold)
    # The mean over folds is reported too: a partial AUC is not additive.
    by_fold = [_pauc_or_none(target[fold == k], score[fold == k]) for k in folds]
    known = [value for value in by_fold if value is not None]
    top = top_k(target, score, patient)
    return {
        "pauc": pauc(target, score),
        "auc": roc_auc(target, score),
        f"top_{TOP_K}_by_lesion": top.by_lesion,
        f"top_{TOP_K}_by_patient": top.by_patient,
        "patients_with_malignant": top.num_patients,
        f"patients_of_at_most_{TOP_K}": top.num_small,
        "pauc_by_fold": by_fold,
        "pauc_mean": float(np.mean(known)) if known else None,
        "pauc_std": float(np.std(known, ddof=1)) if len(known) > 1 else None,
    }


def _pauc_or_none(target: NDArray[np.integer], score: Scores) -> float | None:
    return pauc(target, score) if target.min() < target.max() else None


BY_LESION = f"top-{TOP_K} by lesion"
"""Heading of a column, as wide as the column."""


def format_scores(rows: dict[str, dict[str, Any]]) -> str:
    """Return the summaries as lines of text, one per row, under a heading, with notes below."""
    width = max(len(name) for name in rows)
    lines = [f"{'':{width}}  pAUC pooled  mean of folds ± std     AUC  {BY_LESION}  by patient"]
    more: list[str] = []
    notes: list[str] = []
    for name, summary in rows.items():
        lines.append(_line(name.ljust(width), summary))
        more += _plan_lines(name, summary)
        notes += _notes(summary)
        if CALIBRATION in summary:
            more.append(f"{name}: {describe_calibration(summary[CALIBRATION])}")
    # The same note once: ensembles of one dataset have the same patients.
    return "\n".join([*lines, *more, *format_triage(rows), *dict.fromkeys(notes)])


def _line(name: str, summary: dict[str, Any]) -> str:
    by_lesion = summary[f"top_{TOP_K}_by_lesion"]
    by_patient = summary[f"top_{TOP_K}_by_patient"]
    return (
        f"{name}  {summary['pauc']:11.4f}  {_mean_of_folds(summary):>19}  {summary['auc']:.4f}  "
        f"{by_lesion:{len(BY_LESION)}.3f}  {by_patient:10.3f}"
    )


def _mean_of_folds(summary: dict[str, Any]) -> str:
    mean = summary["pauc_mean"]
    std = summary["pauc_std"]
    if mean is None:
        return "-"
    if std is None:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {std:.4f}"


def _plan_lines(name: str, summary: dict[str, Any]) -> list[str]:
    by_split = summary.get("pauc_by_split", {})
    if not by_split:
        return []
    mean = summary["pauc_mean_of_splits"]
    std = summary["pauc_std_of_splits"]
    values = by_split.values()
    return [
        f"{name}: pAUC {mean:.4f} ± {std:.4f} over {len(values)} fold plans "
        f"({min(values):.4f} to {max(values):.4f})"
    ]


def _notes(summary: dict[str, Any]) -> list[str]:
    num_small = summary[f"patients_of_at_most_{TOP_K}"]
    if not num_small:
        return []
    return [f"note: {small_patients(num_small, summary['patients_with_malignant'])}"]


def small_patients(num_small: int, num_patients: int) -> str:
    """Return a sentence on patients whose malignant lesions are in the top whatever the scores."""
    return (
        f"{num_small:,} of the {num_patients:,} patients with a malignant lesion have at most "
        f"{TOP_K} lesions, so theirs count as found in the top {TOP_K} whatever their scores"
    )
