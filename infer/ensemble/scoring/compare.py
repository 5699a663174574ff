"""`python -m infer compare A B`: tests whether B is better than A out of fold, or by chance."""

import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.ensemble.blends.artifact import Scorer, ensembles_of, open_scorer
from infer.ensemble.blends.ranks import Scores
from infer.ensemble.boosting.splits import (
    PlanPairs,
    paired_by_fold,
    read_plans,
    shared_plans,
    split_seeds,
)
from infer.ensemble.scoring.chosen import choice_notes
from infer.ensemble.scoring.comparison import Comparison, patient_draws
from infer.ensemble.scoring.training_rows import patients_of
from infer.ensemble.settings import CompareSettings
from isic import schema
from isic.dataset import Dataset
from isic.metrics import pauc
from isic.runtime.errors import UserError

TRAIN_MORE = (
    "; to compare the recipes behind them, fit ensembles of several training runs and give them "
    "all: compare a1,a2,a3 b1,b2,b3"
)

SHARED_NETWORKS = (
    "note: several ensembles of one side were fitted on the same trained network, so p is over "
    "fits of the boosters and does not cover chance in training"
)

MIN_PLANS = 3
"""Fold plans that both sides need for a test over folds."""


def compare_ensembles(settings: CompareSettings) -> None:
    """Print a paired test over seeds, folds or training runs, and a bootstrap over patients."""
    first = _open(settings.first)
    second = _open(settings.second)
    if len(first) != len(second):
        raise UserError(
            f"cannot compare {len(first)} ensembles with {len(second)}; "
            "give the same number on both sides"
        )
    found = compare_sides(first, second, settings.data, settings.draws, settings.seed)
    _print(found)
    for note in notes(first, second):
        print(note)
    train_more = found.certain and found.trained_once
    print(f"\nsecond against first: {found.verdict}{TRAIN_MORE if train_more else ''}")


def _open(paths: Sequence[Path]) -> list[Scorer]:
    ensembles = [open_scorer(path) for path in paths]
    roots = [ensemble.root.resolve() for ensemble in ensembles]
    for root in roots:
        if roots.count(root) > 1:
            raise UserError(f"{root} is given twice on one side; give each training run once")
    return ensembles


def compare_sides(
    first: Sequence[Scorer], second: Sequence[Scorer], data: Path, num_draws: int, seed: int = 0
) -> Comparison:
    """Compare the out-of-fold scores of two sides with the same number of ensembles.

    Raises:
        UserError: the ensembles were scored on different rows or folds, two of a side have equal
            scores, or the dataset is another one, see `patients_of`.
    """
    tables = same_rows([*first, *second])
    blends = [table["blend"].to_numpy() for table in tables]
    sides = blends[: len(first)], blends[len(first) :]
    for ensembles, scores in zip((first, second), sides, strict=True):
        _refuse_equal_scores(ensembles, scores)
    rows = tables[0]
    target = rows[schema.TARGET].to_numpy()
    dataset = Dataset(data)
    patient = patients_of([*first, *second], rows, dataset, dataset.metadata("train"))
    draws = partial(patient_draws, target, patient=patient, num_draws=num_draws)
    images = any(ensemble.uses_images for ensemble in (*first, *second))
    pairs = _plans_to_compare(first, second)
    if pairs:
        sides = [pair[0].blend for pair in pairs], [pair[1].blend for pair in pairs]
        overlap = 1 / (len(np.unique(pairs[0][0].fold)) - 1)
        fits = paired_by_fold(target, pairs)
        return Comparison(fits, draws(*sides, seed=seed), "folds", overlap, trained_once=images)
    patients = draws(*sides, seed=seed)
    if len(first) == 1:
        fits = paired(pauc_by_seed(first[0]), pauc_by_seed(second[0]))
        return Comparison(fits, patients, "seeds", trained_once=images or len(fits) < 2)
    fits = np.array([[pauc(target, score) for score in side] for side in sides]).T
    shared = _share_networks(first) or _share_networks(second)
    trained = any(map(_trained_networks, (*first, *second)))
    unit = "runs" if trained and not shared else "boosters"
    return Comparison(fits, patients, unit, trained_once=shared)


def _refuse_equal_scores(ensembles: Sequence[Scorer], scores: Sequence[Scores]) -> None:
    """Raise a UserError if two ensembles have the same scores: they are one training run."""
    for (first, score), (second, other) in itertools.combinations(
        zip(ensembles, scores, strict=True), 2
    ):
        if np.array_equal(score, other):
            raise UserError(
                f"{first.root} and {second.root} have equal scores, so they are one training run; "
                "give ensembles of other training runs, or without images of other fits (--seed)"
            )


def _share_networks(ensembles: Sequence[Scorer]) -> bool:
    """Return whether two ensembles were fitted on a trained network with the same weights."""
    networks = [_trained_networks(ensemble) for ensemble in ensembles]
    return any(first & second for first, second in itertools.combinations(networks, 2))


def _trained_networks(scorer: Scorer) -> set[tuple[str, str]]:
    """Return the names of an ensemble's networks, each with the checkpoints of its folds."""
    return {
        (name, json.dumps(origin["checkpoints"], sort_keys=True))
        for ensemble in ensembles_of(scorer)
        for name, origin in ensemble.manifest["embeddings"].items()
    }


def _plans_to_compare(first: Sequence[Scorer], second: Sequence[Scorer]) -> PlanPairs:
    """Return the shared plans of two single ensembles; none if there are too few for a test."""
    if len(first) > 1 or len(_shared_seeds(first[0], second[0])) < MIN_PLANS:
        return []
    return shared_plans(read_plans(first[0].root), read_plans(second[0].root))


def _shared_seeds(first: Scorer, second: Scorer) -> set[int]:
    """Return the split seeds that both ensembles have."""
    return set(split_seeds(first.manifest)) & set(split_seeds(second.manifest))


def same_rows(scorers: Sequence[Scorer]) -> list[pl.DataFrame]:
    """Return the out-of-fold scores of each, in the order of the ids.

    Raises:
        UserError: they were scored on different rows or folds.
    """
    tables = [scorer.oof().sort(schema.ID) for scorer in scorers]
    # Pairs of scores are comparable only for equal rows that equal folds held out.
    rows = [table.select(schema.ID, "fold", schema.TARGET) for table in tables]
    for scorer, other in zip(scorers, rows, strict=True):
        if not other.equals(rows[0]):
            raise UserError(
                f"{scorers[0].root} and {scorer.root} were scored on different rows or folds; "
                "fit both on the same"
            )
    return tables


def pauc_by_seed(scorer: Scorer) -> dict[int, float]:
    """Return the pooled pAUC of each seed's models; empty without boosters."""
    target = scorer.oof()[schema.TARGET].to_numpy()
    return {seed: pauc(target, score) for seed, score in scorer.scores_by_seed().items()}


def paired(first: dict[int, float], second: dict[int, float]) -> NDArray[np.float64]:
    """Return [num_seeds, 2] for the seeds that both have."""
    pairs = [[first[seed], second[seed]] for seed in first if seed in second]
    return np.array(pairs).reshape(-1, 2)


def notes(first: Sequence[Scorer], second: Sequence[Scorer]) -> list[str]:
    """Return lines on differences between the ensembles, and on choices by their scored rows."""
    ensembles = [*first, *second]
    chosen = [choice_notes(ensemble.root.name, ensemble.manifest) for ensemble in ensembles]
    shared = [SHARED_NETWORKS] if _share_networks(first) or _share_networks(second) else []
    return [*_plans_note(ensembles), *_seeds_note(ensembles), *shared, *itertools.chain(*chosen)]


def _plans_note(ensembles: Sequence[Scorer]) -> list[str]:
    seeds = [split_seeds(ensemble.manifest) for ensemble in ensembles]
    if not any(seeds):
        return []
    if len(ensembles) > 2:
        return ["note: of several ensembles per side, only the first fold plans are compared"]
    num_shared = len(_shared_seeds(*ensembles))
    counts = _listed(ensembles, [len(of) or 1 for of in seeds])
    if num_shared >= MIN_PLANS:
        return [f"note: folds of the {num_shared} fold plans that both have ({counts})"]
    return [
        f"note: only the first fold plan is compared, because a test over plans needs {MIN_PLANS} "
        f"that both have ({counts}); fit both with equal --splits and --split_seed"
    ]


def _seeds_note(ensembles: Sequence[Scorer]) -> list[str]:
    counts = [len(ensemble.scores_by_seed()) for ensemble in ensembles]
    # Without boosters there are none.
    if len({count for count in counts if count}) < 2:
        return []
    return [
        f"note: the numbers of seeds differ ({_listed(ensembles, counts)}), and a mean over more "
        "seeds scores higher by itself; fit all with equal --seeds"
    ]


def _listed(ensembles: Sequence[Scorer], counts: Sequence[int]) -> str:
    pairs = zip(ensembles, counts, strict=True)
    return ", ".join(f"{ensemble.root.name} {count}" for ensemble, count in pairs)


def _print(found: Comparison) -> None:
    print(f"{'':12} {'first':>8} {'second':>8} {'second - first':>15}")
    if found.tested:
        first, second = found.fits.mean(axis=0)
        print(
            f"{found.unit:12} {first:8.4f} {second:8.4f} {found.difference:+15.4f}"
            f"   p = {found.p:.2g}, better in {found.wins} of {len(found.fits)}"
        )
    first, second = found.draws.mean(axis=0)
    low, middle, high = found.interval
    print(
        f"{'patients':12} {first:8.4f} {second:8.4f} {middle:+15.4f}"
        f"   95 % of bootstrap samples in {low:+.4f} .. {high:+.4f}"
    )
    if not found.tested:
        print("the ensembles share fewer than two seeds, so only the bootstrap decides")
