"""`python -m benchmarks submissions`: scores of submissions on a test split with known labels."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from benchmarks.record import Row, print_and_append
from benchmarks.settings import SubmissionsSettings
from infer.ensemble.blends.ranks import rank_correlation
from infer.ensemble.scoring.comparison import Comparison, patient_draws
from isic import schema
from isic.arrays import Floats
from isic.dataset import Dataset
from isic.metadata import with_patient
from isic.metrics import pauc, roc_auc
from isic.runtime.errors import UserError
from isic.tables import read_csv

NO_FITS = np.empty((0, 2))
"""A submission is one fit, so that only the patients are drawn."""


def submissions(settings: SubmissionsSettings) -> None:
    """Run `benchmarks submissions`, which its settings describe."""
    rows = read_truth(settings.data, settings.truth or settings.data / "test-truth.csv")
    scores = {path.stem: read_scores(path, rows) for path in settings.submissions}
    if len(scores) < len(settings.submissions):
        raise UserError("two submissions have the same file name; give each a name of its own")
    target = rows[schema.TARGET].to_numpy()
    patient = rows[schema.PATIENT].to_numpy()
    compared = compare_with_first(target, patient, scores, settings.draws)
    about = {
        "data": settings.label,
        "rows": len(rows),
        "positives": int(target.sum()),
        "patients": rows[schema.PATIENT].n_unique(),
    }
    table = [{"what": name, **about, **row} for name, row in compared.items()]
    print(f"appended to {print_and_append('submissions', table, settings.results)}")


def read_truth(data: Path, path: Path) -> pl.DataFrame:
    """Return `isic_id`, `patient_id` and `target` of the test rows. Raise UserError."""
    labels = _read_numbers(path)
    rows = with_patient(Dataset(data).metadata("test")).select(schema.ID, schema.PATIENT)
    return _join(rows, labels, path)


def read_scores(path: Path, rows: pl.DataFrame) -> Floats:
    """Return [N] a submission's scores in the order of `rows`. Raise UserError if some lack one."""
    return _join(rows.select(schema.ID), _read_numbers(path), path)[schema.TARGET].to_numpy()


def _read_numbers(path: Path) -> pl.DataFrame:
    table = read_csv(path)
    if not {schema.ID, schema.TARGET} <= set(table.columns):
        raise UserError(f"{path} lacks the columns {schema.ID} and {schema.TARGET}")
    number = pl.col(schema.TARGET).cast(pl.Float64, strict=False)
    return table.select(schema.ID, number)


def _join(rows: pl.DataFrame, numbers: pl.DataFrame, path: Path) -> pl.DataFrame:
    found = rows.join(numbers, on=schema.ID, how="left", maintain_order="left")
    num_missing = found[schema.TARGET].null_count()
    if num_missing:
        raise UserError(f"{path} lacks a number for {num_missing} of the {len(rows)} test rows")
    return found


def compare_with_first(
    target: NDArray[np.floating],
    patient: NDArray[np.str_],
    scores: Mapping[str, Floats],
    num_draws: int,
) -> dict[str, Row]:
    """Return the pAUC of each submission, and its comparison with the first one.

    The intervals hold 95 % of the bootstrap samples of the patients.
    """
    first_name, first = next(iter(scores.items()))
    found = {}
    for name, score in scores.items():
        draws = patient_draws(target, [first], [score], patient, num_draws)
        low, high = np.percentile(draws[:, 1], [2.5, 97.5])
        compared = Comparison(NO_FITS, draws).row()
        value = pauc(target, score)
        found[name] = {
            "pauc": round(value, 4),
            "pauc_low": round(float(low), 4),
            "pauc_high": round(float(high), 4),
            "auc": round(roc_auc(target, score), 4),
            "first": None if score is first else first_name,
            "difference": None if score is first else round(value - pauc(target, first), 4),
            **{key: compared[key] for key in ("low", "high", "verdict")},
            "rank_correlation": _correlation(first, score),
        }
    return found


def _correlation(first: Floats, score: Floats) -> float | None:
    if score is first:
        return None
    value = rank_correlation(first, score)
    return None if value is None else round(value, 4)
