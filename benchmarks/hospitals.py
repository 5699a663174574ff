"""`python -m benchmarks hospitals`: scores at a hospital that no training row comes from.

A hospital that training rows lack has an `attribution` that no booster has met. The ways to treat
categories are compared with the first of them: on each hospital, held out in turn, and in ordinary
cross-validation, which shows the cost of a treatment when every hospital is known.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from benchmarks.record import write
from infer.ensemble.comparison import Comparison, compare_scores
from infer.ensemble.feature_spec import FeatureSpec
from infer.ensemble.fit_settings import FitSettings
from infer.ensemble.out_of_fold import fit_boosters
from isic import schema
from isic.dataset import Dataset
from isic.folds import draw_folds
from isic.metadata import with_patient
from isic.runtime.config import Settings, Several, build
from isic.runtime.errors import UserError

HOSPITAL = "attribution"
OF_HOSPITAL = (HOSPITAL, "copyright_license")
"""Columns that follow from the hospital."""


class HospitalSettings(Settings):
    """Settings of `benchmarks hospitals`."""

    data: Path = Field(description="dataset folder; its training rows are scored")
    label: str = Field(description="name of the data in the table")
    features: Several[str] = Field(("raw", "engineered"), description="feature sets")
    blank_shares: Several[float] = Field(
        (0.1, 0.2), description="shares of training rows to blank categories in"
    )
    min_positives: int = Field(
        10, ge=1, description="malignant lesions of a hospital that is held out"
    )
    split_seeds: Several[int] = Field((7, 11, 13), description="fold plans of the cross-validation")
    num_folds: int = Field(5, ge=2, description="folds of each of them")
    seeds: int = Field(10, ge=2, description="boosters per fold, each with its own seed")
    seed: int = Field(0, ge=0, description="the first of the seeds")
    draws: int = Field(1000, ge=100, description="redraws of the patients")
    num_threads: int = Field(0, ge=0, description="threads, 0 for all")
    results: Path | None = Field(
        None, description="folder of the CSV; benchmarks/results if not given"
    )


@dataclass(frozen=True)
class Treatment:
    """One way to treat the categories."""

    name: str
    without: tuple[str, ...] = ()
    """Features that are left out."""
    blank_share: float = 0.0


@dataclass(frozen=True)
class Rows:
    """Training rows that are scored by boosters fitted without them."""

    group: str
    """Rows of a group are averaged into a line of its own."""
    name: str
    fold: NDArray[np.integer]
    """[N] the rows that are held out together."""
    scored: NDArray[np.bool_]
    """[N]."""


def hospitals(settings: HospitalSettings) -> None:
    """Compares treatments of categories on hospitals held out and in cross-validation."""
    metadata = Dataset(settings.data).metadata("train").sort(schema.ID)
    target = metadata[schema.TARGET].to_numpy()
    patient = with_patient(metadata)[schema.PATIENT].to_numpy()
    places = [*_held_out(metadata, settings), *_cross_validated(metadata, settings)]
    treatments = [
        Treatment("as they are"),
        Treatment("without the hospital", OF_HOSPITAL),
        *(Treatment(f"blanked in {share:g}", (), share) for share in settings.blank_shares),
    ]
    for features in settings.features:
        first: list[NDArray[np.float64]] = []
        for treatment in treatments:
            scores = _scores(metadata, features, treatment, places, settings)
            first = first or scores
            compared = [
                (place, _compare(place, target, patient, before, after, settings.draws))
                for place, before, after in zip(places, first, scores, strict=True)
            ]
            named = {"data": settings.label, "features": features, "treatment": treatment.name}
            rows = [
                {**named, "scored": name, "pauc_mean_of_seeds": _mean(found), **found.row()}
                for name, found in _with_means(compared)
            ]
            write("hospitals", rows, settings.results)


def _held_out(metadata: pl.DataFrame, settings: HospitalSettings) -> list[Rows]:
    """Returns the hospitals with both classes and enough malignant lesions, each held out."""
    hospital = metadata[HOSPITAL].fill_null("blank")
    fold = (hospital.rank("dense") - 1).cast(pl.Int32).to_numpy()
    counts = metadata.group_by(hospital).agg(pl.col(schema.TARGET).sum(), pl.len()).sort(HOSPITAL)
    enough = (pl.col(schema.TARGET) >= settings.min_positives) & (
        pl.col(schema.TARGET) < pl.col("len")
    )
    names = counts.filter(enough)[HOSPITAL].to_list()
    if len(counts) < 2 or not names:
        raise UserError(
            f"{settings.data} has {len(counts)} hospitals, {len(names)} of them with both classes "
            f"and {settings.min_positives} malignant lesions; give data of two or more hospitals"
        )
    return [Rows("hospitals", name, fold, (hospital == name).to_numpy()) for name in names]


def _cross_validated(metadata: pl.DataFrame, settings: HospitalSettings) -> list[Rows]:
    every = np.ones(len(metadata), dtype=bool)
    return [
        Rows(
            "splits",
            f"split seed {seed}",
            draw_folds(metadata, settings.num_folds, seed).of(metadata).to_numpy(),
            every,
        )
        for seed in settings.split_seeds
    ]


def _scores(
    metadata: pl.DataFrame,
    features: str,
    treatment: Treatment,
    places: list[Rows],
    settings: HospitalSettings,
) -> list[NDArray[np.float64]]:
    """Returns [seeds, N] held-out scores for each place; places with the same folds share a fit."""
    spec = FeatureSpec.parse(features.replace("+", ","))
    names = tuple(name for name in spec.tabular if name not in treatment.without)
    shared = {key: getattr(settings, key) for key in ("data", "seeds", "seed", "num_threads")}
    fitting = build(FitSettings, {**shared, "blank_share": treatment.blank_share})
    table, target = spec.frame(metadata, ()), metadata[schema.TARGET].to_numpy()
    found: dict[int, NDArray[np.float64]] = {}
    for place in places:
        if id(place.fold) not in found:
            bag = fit_boosters(table, names, target, place.fold, fitting)
            found[id(place.fold)] = np.stack(list(bag.scores.values()))
    return [found[id(place.fold)] for place in places]


def _compare(
    place: Rows,
    target: NDArray[np.integer],
    patient: NDArray[np.str_],
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    num_draws: int,
) -> Comparison:
    rows = place.scored
    return compare_scores(target[rows], patient[rows], first[:, rows], second[:, rows], num_draws)


def _with_means(compared: list[tuple[Rows, Comparison]]) -> Iterator[tuple[str, Comparison]]:
    """Yields each place's comparison, and after each group of several the mean over them."""
    for group in dict.fromkeys(place.group for place, _ in compared):
        inside = [(place.name, found) for place, found in compared if place.group == group]
        yield from inside
        fits, draws = (
            np.mean([getattr(found, part) for _, found in inside], axis=0)
            for part in ("fits", "draws")
        )
        if len(inside) > 1:
            yield f"mean of {group}", Comparison(fits, draws)


def _mean(found: Comparison) -> float:
    return round(float(found.fits[:, 1].mean()), 4)
