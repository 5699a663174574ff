"""A blend of ensembles on disk: a manifest, out-of-fold scores, and a copy of each member.

| file | content |
| --- | --- |
| `ensemble.json` | the manifest: members, weights, scores, sha256 of each file |
| `members/<name>/` | an ensemble, see `infer.ensemble.artifact` |
| `oof.parquet`, `scores.json` | out-of-fold scores of each member and of the blend; metrics |
| `folds.parquet` | the fold plan, that of all members |
| `calibration.json` | the curve from scores to probabilities, if blended with `--calibrate` |
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.ensemble.artifact import (
    CALIBRATION_FILE,
    ENSEMBLE_FILE,
    MEMBERS_DIR,
    Ensemble,
    find_ensemble,
    open_ensemble,
    read_calibration,
    refuse_damaged,
)
from infer.ensemble.blends.ranks import Scores, blend_ranks, to_scale_of
from infer.ensemble.drift import Summary
from infer.ensemble.features.own_tables import TableSpec
from infer.ensemble.scoring.calibration import Calibration
from infer.ensemble.settings import SOURCES
from isic.layout import OOF_FILE
from isic.runtime.files import read_json
from isic.tables import read_parquet

Weights = Mapping[str, float]
"""Shares of the members by name; their sum is 1."""


@dataclass(frozen=True)
class Blend:
    """A blend that `open_scorer` has read and checked."""

    root: Path
    manifest: Mapping[str, Any]
    members: Mapping[str, Ensemble]
    """By name."""

    @property
    def weights(self) -> Weights:
        return dict(self.manifest["weights"])

    @property
    def is_relative(self) -> bool:
        """Whether a score depends on the patient's other lesions."""
        return any(member.is_relative for member in self.members.values())

    @property
    def uses_images(self) -> bool:
        return any(member.uses_images for member in self.members.values())

    @property
    def own_tables(self) -> Mapping[str, TableSpec]:
        """The tables of own columns that a table to score needs, by name."""
        return {
            name: table
            for member in self.members.values()
            for name, table in member.own_tables.items()
        }

    @cached_property
    def training(self) -> Summary:
        """Columns of the training table that any member reads, by name."""
        members = self.members.values()
        return {name: column for each in members for name, column in each.training.items()}

    @cached_property
    def calibration(self) -> Calibration | None:
        return read_calibration(self.root, self.manifest)

    def oof(self) -> pl.DataFrame:
        """Return `isic_id`, `fold`, `target`, each member's out-of-fold scores, and `blend`."""
        return read_parquet(self.root / OOF_FILE)

    def oof_models(self) -> dict[str, Scores]:
        """Return [M] the out-of-fold scores of the training rows by member, needed or not."""
        oof = self.oof()
        return {name: oof[name].to_numpy() for name in self.manifest["members"]}

    def scores_by_seed(self) -> dict[int, Scores]:
        """Return [N] out-of-fold scores per seed that every member with boosters has."""
        seeded = {name: member.scores_by_seed() for name, member in self.members.items()}
        oof = self.oof()
        unseeded = {name: oof[name].to_numpy() for name, of in seeded.items() if not of}
        seeds = [set(of) for of in seeded.values() if of]
        fold = oof["fold"].to_numpy()
        found = {}
        for seed in sorted(set.intersection(*seeds)) if seeds else ():
            scores = {name: of[seed] for name, of in seeded.items() if of} | unseeded
            found[seed] = self.out_of_fold(scores, fold)
        return found

    def out_of_fold(self, scores: Mapping[str, Scores], fold: NDArray[np.integer]) -> Scores:
        """Return [N] the blend of out-of-fold scores, by the weights of each row's fold."""
        return blend_by_fold(scores, self.weights_by_fold, fold)

    @property
    def weights_by_fold(self) -> dict[int, Weights]:
        """The weights of each held-out fold's rows, which their labels have not chosen."""
        return {int(fold): weights for fold, weights in self.manifest["weights_by_fold"].items()}

    @property
    def single_lesion_members(self) -> list[str]:
        """The members whose score of a lesion does not depend on the patient's others."""
        return [name for name, member in self.members.items() if not member.is_relative]

    def score(self, scores: Mapping[str, Scores]) -> Scores:
        """Return [N] the blend of the members' scores of other rows than those of training."""
        return blend_ranks(scores, self.weights, self.oof_models())

    def score_of_single_lesions(self, scores: Mapping[str, Scores]) -> Scores:
        """Return [N] the same by `single_lesion_members` only, on the scale of the blend."""
        part = self.single_lesion_part
        return part.to_scale(part.blend.score(scores))

    @cached_property
    def single_lesion_part(self) -> "PartOfBlend":
        """The blend of `single_lesion_members`."""
        part = with_members(self, self.single_lesion_members)
        return PartOfBlend(part, out_of_fold(part), out_of_fold(self))


@dataclass(frozen=True, eq=False)
class PartOfBlend:
    """A blend of some members of another one, with the [M] out-of-fold scores of both."""

    blend: Blend
    own_scores: Scores
    whole_scores: Scores

    def to_scale(self, score: Scores) -> Scores:
        """Return [N] scores of the part on the scale of the whole."""
        # A mean of fewer ranks spreads wider, so its rows would gather at both ends of a ranking.
        return to_scale_of(score, self.own_scores, self.whole_scores)


Scorer = Ensemble | Blend
"""Anything that has out-of-fold scores and scores a table."""


def ensembles_of(scorer: Scorer) -> list[Ensemble]:
    """Return the members of a blend, or the ensemble itself."""
    return list(scorer.members.values()) if isinstance(scorer, Blend) else [scorer]


def needed_part(scorer: Scorer) -> Scorer:
    """Return the part of a blend that scores a table: the members that have a weight.

    A search may give others none. Those of raw features stay all the same, for `--few raw`.
    """
    if isinstance(scorer, Ensemble):
        return scorer
    members = {
        name: member
        for name, member in scorer.members.items()
        if scorer.weights[name] or _is_of_raw_features(member)
    }
    # The manifest stays: weights that were chosen for a fold may include the others.
    return replace(scorer, members=members)


def networks_of(scorer: Scorer) -> set[str]:
    """Return the names of the networks that an ensemble needs."""
    return {
        name
        for ensemble in ensembles_of(needed_part(scorer))
        for flag in SOURCES
        for name in ensemble.manifest[flag]
    }


def columns_of(scorer: Scorer) -> list[str]:
    """Return the metadata columns that the features of an ensemble or a blend read."""
    columns = (name for each in ensembles_of(scorer) for name in each.spec.needed_columns)
    return list(dict.fromkeys(columns))


def _is_of_raw_features(ensemble: Ensemble) -> bool:
    return not (ensemble.is_relative or ensemble.uses_images or ensemble.own_tables)


def out_of_fold(scorer: Scorer) -> Scores:
    """Return [N] the out-of-fold scores of the training rows, also of a part of a blend."""
    oof = scorer.oof()
    if isinstance(scorer, Blend):
        return scorer.out_of_fold(scorer.oof_models(), oof["fold"].to_numpy())
    scores: Scores = oof["blend"].to_numpy()
    return scores


def with_members(blend: Blend, names: Collection[str]) -> Blend:
    """Return a blend of some members, with the same ratio of their weights; equal ones if all 0.

    A part of the members has no calibration.
    """
    by_fold = {str(fold): _share(weights, names) for fold, weights in blend.weights_by_fold.items()}
    files = dict(blend.manifest["files"])
    if set(names) < set(blend.members):
        # The curve is of mean ranks over all members; those over fewer spread wider.
        files.pop(CALIBRATION_FILE, None)
    manifest = {
        **blend.manifest,
        "files": files,
        "members": {name: blend.manifest["members"][name] for name in names},
        "weights": _share(blend.weights, names),
        "weights_by_fold": by_fold,
    }
    members = {name: blend.members[name] for name in names}
    return replace(blend, manifest=manifest, members=members)


def _share(weights: Weights, names: Collection[str]) -> dict[str, float]:
    total = sum(weights[name] for name in names)
    return {name: weights[name] / total if total else 1 / len(names) for name in names}


def blend_by_fold(
    scores: Mapping[str, Scores], weights: Mapping[int, Weights], fold: NDArray[np.integer]
) -> Scores:
    """Return [N] the weighted mean of ranks among all N scores.

    Args:
        scores: [N] by member.
        weights: of the rows of each fold.
        fold: [N].
    """
    blended = np.zeros(len(fold))
    for k, of_fold in weights.items():
        rows = fold == k
        blended[rows] = blend_ranks(
            {name: score[rows] for name, score in scores.items()}, of_fold, scores
        )
    return blended


def mean_probability(scorer: Scorer) -> Scores:
    """Return [N] the mean out-of-fold probability of all models, by the weights of a blend."""
    # Not the score: over several libraries and over the members of a blend, it is a mean of ranks.
    if isinstance(scorer, Blend):
        return mean_of_members(scorer.members, scorer.weights)
    return mean_of_models(scorer.oof_models())


def mean_of_members(members: Mapping[str, Ensemble], weights: Weights) -> Scores:
    """Return [N] the mean out-of-fold probability of the members of a blend."""
    return np.asarray(sum(weights[name] * mean_probability(each) for name, each in members.items()))


def mean_of_models(models: Mapping[str, Scores]) -> Scores:
    return np.asarray(np.mean(list(models.values()), axis=0))


def open_scorer(path: Path) -> Scorer:
    """Read and check the ensemble or blend in a folder, or in the only one within the folder.

    Raises:
        UserError: there is none, or several; a file is missing or damaged.
    """
    root = find_ensemble(path)
    manifest = read_json(root / ENSEMBLE_FILE)
    if "members" not in manifest:
        return open_ensemble(root)
    refuse_damaged(root, manifest)
    members = {name: open_ensemble(root / MEMBERS_DIR / name) for name in manifest["members"]}
    return Blend(root, manifest, members)
