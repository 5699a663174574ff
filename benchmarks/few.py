"""`python -m benchmarks few`: scores when only some of a patient's lesions are sent together.

Each held-out patient's lesions are cut at random into groups of a given size, and each group is
scored as if it were all that is known of the patient. Boosters are fitted on whole patients.
"""

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from benchmarks.record import Row, write
from infer.ensemble.boosters import LIBRARIES
from infer.ensemble.comparison import compare_scores
from infer.ensemble.feature_spec import FeatureSpec
from infer.ensemble.fit_settings import FitSettings
from infer.ensemble.out_of_fold import FitResult, fit_boosters
from isic import schema
from isic.dataset import Dataset
from isic.folds import draw_folds
from isic.metadata import with_patient
from isic.metrics import pauc, roc_auc
from isic.runtime.config import Settings, Several, build


class FewSettings(Settings):
    """Settings of `benchmarks few`."""

    data: Path = Field(description="dataset folder; its training rows are scored out of fold")
    label: str = Field(description="name of the data in the table")
    features: Several[str] = Field(
        ("raw", "engineered"), description="feature sets; the others are compared with the first"
    )
    sizes: Several[int] = Field(
        (1, 2, 3, 5, 10, 20), description="lesions of a patient that are sent together"
    )
    num_folds: int = Field(5, ge=2, description="folds")
    split_seed: int = Field(42, ge=0, description="seed of the folds")
    seeds: int = Field(3, ge=1, description="boosters per fold, each with its own seed")
    draws: int = Field(1000, ge=100, description="redraws of the patients")
    num_threads: int = Field(0, ge=0, description="threads, 0 for all")
    results: Path | None = Field(
        None, description="folder of the CSV; benchmarks/results if not given"
    )


def few(settings: FewSettings) -> None:
    """Scores every set of features on groups of each size, and on whole patients."""
    metadata = with_patient(Dataset(settings.data).metadata("train")).sort(schema.ID)
    fold = draw_folds(metadata, settings.num_folds, settings.split_seed).of(metadata).to_numpy()
    target, patient = metadata[schema.TARGET].to_numpy(), metadata[schema.PATIENT].to_numpy()
    tables = {str(size): in_groups(metadata, size) for size in settings.sizes} | {"all": metadata}
    first: dict[str, NDArray[np.float64]] = {}
    for features in settings.features:
        spec = FeatureSpec.parse(features.replace("+", ","))
        shared = {key: getattr(settings, key) for key in ("data", "seeds", "num_threads")}
        whole = spec.frame(metadata, ())
        bag = fit_boosters(whole, spec.tabular, target, fold, build(FitSettings, shared))
        for size, table in tables.items():
            scores = held_out_scores(bag, spec.frame(table, ()), fold)
            first.setdefault(size, scores)
            compared = compare_scores(target, patient, first[size], scores, settings.draws)
            row = {"data": settings.label, "features": features, "lesions_together": size}
            write("few", [{**row, **_worth(target, scores), **compared.row()}], settings.results)


def in_groups(metadata: pl.DataFrame, size: int, seed: int = 0) -> pl.DataFrame:
    """Returns the table with each patient replaced by groups of at most `size` of their lesions."""
    shuffled = metadata.sort(schema.ID).sample(fraction=1, shuffle=True, seed=seed)
    group = pl.int_range(pl.len()).over(schema.PATIENT) // size
    named = pl.format("{} group {}", schema.PATIENT, group).alias(schema.PATIENT)
    return shuffled.with_columns(named).sort(schema.ID)


def held_out_scores(
    bag: FitResult, table: pl.DataFrame, fold: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Returns [seeds, N] the scores of a feature table's rows by the boosters of their own fold."""
    scores = np.zeros((len(bag.scores), len(table)))
    rows = {k: encoding.transform(table.filter(fold == k)) for k, encoding in bag.encodings.items()}
    numbers = {seed: i for i, seed in enumerate(dict.fromkeys(seed for _, _, seed in bag.boosters))}
    for (library, k, seed), text in bag.boosters.items():
        scores[numbers[seed], fold == k] = LIBRARIES[library].load(text)(rows[k], 1)
    return scores


def _worth(target: NDArray[np.integer], scores: NDArray[np.float64]) -> Row:
    score = scores.mean(axis=0)
    return {"pauc": round(pauc(target, score), 4), "auc": round(roc_auc(target, score), 4)}
