"""`python -m benchmarks hospitals`: scores at a hospital without training rows.

A new hospital has an `attribution` that no booster was trained on. Treatments of categories are
compared with the first one: on each hospital, held out in turn, and in cross-validation.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from benchmarks.record import Row, print_and_append
from benchmarks.settings import HospitalSettings
from infer.ensemble.boosting.out_of_fold import fit_boosters
from infer.ensemble.boosting.training_table import TrainingTable
from infer.ensemble.features.spec import FeatureSpec
from infer.ensemble.scoring.comparison import Comparison, compare_scores
from infer.ensemble.settings import FitSettings
from isic import schema
from isic.arrays import Floats, codes
from isic.dataset import Dataset
from isic.folds import draw_folds
from isic.metadata import with_patient
from isic.runtime.config import build
from isic.runtime.errors import UserError

HOSPITAL = "attribution"
OF_HOSPITAL = (HOSPITAL, "copyright_license")
"""Columns that depend on the hospital."""


@dataclass(frozen=True)
class Treatment:
    """One way to treat the categories."""

    name: str
    without: tuple[str, ...] = ()
    """Features that are dropped."""
    blank_share: float = 0.0
    """Share of training rows in which each category is blanked."""
    blank: tuple[str, ...] = ()
    """The categories that are blanked; all if empty."""


@dataclass(frozen=True)
class HeldOut:
    """Rows that are scored by boosters fitted without them."""

    group: str
    """Comparisons of a group are also averaged."""
    name: str
    fold: NDArray[np.integer]
    """[N]; rows of a fold are held out together."""
    scored: NDArray[np.bool_]
    """[N]."""


@dataclass(frozen=True)
class TrainingRows:
    """The rows of the dataset, sorted by id."""

    metadata: pl.DataFrame
    target: NDArray[np.integer]
    patient: NDArray[np.str_]


def hospitals(settings: HospitalSettings) -> None:
    """Run `benchmarks hospitals`, which its settings describe."""
    metadata = Dataset(settings.data).metadata("train").sort(schema.ID)
    training = TrainingRows(
        metadata,
        metadata[schema.TARGET].to_numpy(),
        with_patient(metadata)[schema.PATIENT].to_numpy(),
    )
    held_out = [*_hospitals(metadata, settings), *_splits(metadata, settings)]
    treatments = [
        Treatment("as they are"),
        Treatment("without the hospital", without=OF_HOSPITAL),
        *(Treatment(f"blanked in {share:g}", blank_share=share) for share in settings.blank_shares),
        *(
            Treatment(f"hospital blanked in {share:g}", blank_share=share, blank=OF_HOSPITAL)
            for share in settings.hospital_shares
        ),
    ]
    for features in settings.features:
        first: list[Floats] = []
        for treatment in treatments:
            scores = _scores(training, features, treatment, held_out, settings)
            first = first or scores
            compared = []
            for part, before, after in zip(held_out, first, scores, strict=True):
                comparison = _compare(part, training, before, after, settings.draws)
                compared.append((part, comparison))
            named = {"data": settings.label, "features": features, "treatment": treatment.name}
            rows = [{**named, **row} for row in _rows(compared)]
            print_and_append("hospitals", rows, settings.results)


def _hospitals(metadata: pl.DataFrame, settings: HospitalSettings) -> list[HeldOut]:
    """Return the hospitals with both classes and enough malignant lesions, each held out."""
    hospital = metadata[HOSPITAL].fill_null("blank")
    # Each hospital is a fold of its own.
    fold = codes(hospital)
    counts = metadata.group_by(hospital).agg(pl.col(schema.TARGET).sum(), pl.len()).sort(HOSPITAL)
    has_enough = pl.col(schema.TARGET) >= settings.min_positives
    has_benign = pl.col(schema.TARGET) < pl.col("len")
    names = counts.filter(has_enough & has_benign)[HOSPITAL].to_list()
    if len(counts) < 2 or not names:
        raise UserError(
            f"{settings.data} has {len(counts)} hospitals, {len(names)} of them with both classes "
            f"and {settings.min_positives} malignant lesions; use data of two or more hospitals"
        )
    return [HeldOut("hospitals", name, fold, (hospital == name).to_numpy()) for name in names]


def _splits(metadata: pl.DataFrame, settings: HospitalSettings) -> list[HeldOut]:
    """Return all rows, held out by fold, for each fold plan."""
    scored = np.ones(len(metadata), dtype=bool)
    held_out = []
    for seed in settings.split_seeds:
        fold = draw_folds(metadata, settings.num_folds, seed).of(metadata).to_numpy()
        held_out.append(HeldOut("splits", f"split seed {seed}", fold, scored))
    return held_out


def _scores(
    training: TrainingRows,
    features: str,
    treatment: Treatment,
    held_out: list[HeldOut],
    settings: HospitalSettings,
) -> list[Floats]:
    """Return the held-out scores [seeds, N] of each part; equal folds share a fit."""
    spec = FeatureSpec.parse(features.replace("+", ","))
    names = tuple(name for name in spec.tabular if name not in treatment.without)
    flags = {
        "data": settings.data,
        "seeds": settings.seeds,
        "seed": settings.seed,
        "num_threads": settings.num_threads,
        "blank_share": treatment.blank_share,
        "blank": treatment.blank,
    }
    fit_settings = build(FitSettings, flags)
    table = spec.frame(training.metadata, ())
    fitted: dict[int, Floats] = {}  # by the identity of the fold array
    for part in held_out:
        if id(part.fold) not in fitted:
            bag = fit_boosters(
                TrainingTable(table), names, training.target, part.fold, fit_settings
            )
            fitted[id(part.fold)] = np.stack(list(bag.scores.values()))
    return [fitted[id(part.fold)] for part in held_out]


def _compare(
    part: HeldOut, training: TrainingRows, first: Floats, second: Floats, num_draws: int
) -> Comparison:
    return compare_scores(
        training.target[part.scored],
        training.patient[part.scored],
        first[:, part.scored],
        second[:, part.scored],
        num_draws,
    )


def _rows(compared: list[tuple[HeldOut, Comparison]]) -> Iterator[Row]:
    for group in dict.fromkeys(part.group for part, _ in compared):
        comparisons = [found for part, found in compared if part.group == group]
        for part, found in compared:
            if part.group == group:
                yield _row(part.name, found)
        if len(comparisons) > 1:
            fits = np.mean([found.fits for found in comparisons], axis=0)
            draws = np.mean([found.draws for found in comparisons], axis=0)
            yield _row(f"mean of {group}", Comparison(fits, draws))


def _row(name: str, found: Comparison) -> Row:
    mean = round(float(found.fits[:, 1].mean()), 4)
    return {"scored": name, "pauc_mean_of_seeds": mean, **found.row()}
