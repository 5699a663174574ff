"""The rows of a triage: their scores, and the models that score changed rows again."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.embedding.store import refuse_other_origin
from infer.ensemble.artifact import Ensemble
from infer.ensemble.blends.artifact import Blend, Scorer, ensembles_of
from infer.ensemble.blends.ranks import Scores, blend, blend_ranks
from infer.ensemble.boosting.libraries import (
    LIBRARIES,
    Contribute,
    Predict,
    read_booster,
    read_booster_text,
)
from infer.ensemble.boosting.out_of_fold import mean_of_folds, scores_by_fold
from infer.ensemble.features.own_tables import OwnTable
from infer.ensemble.images.features import ImageRows, embedding_origins, fit_images
from infer.ensemble.images.scores import image_probability
from infer.ensemble.score_table import TableScores, read_images, sources_by_member
from infer.ensemble.scoring.calibration import out_of_fold_probability
from infer.ensemble.settings import EmbeddingSources
from infer.triage.causes import Attribution, Cause, find_causes
from isic import schema
from isic.arrays import Floats
from isic.dataset import Split
from isic.features import Encoding
from isic.runtime.errors import UserError

KeyT = TypeVar("KeyT")
BoosterKey = tuple[str, int, int]
"""Library, fold and seed."""


@dataclass(frozen=True, eq=False)
class Contributions:
    """How much each cause and each metadata column adds to the log-odds of N rows."""

    causes: Mapping[Cause, Floats]
    """[N] each."""
    columns: Mapping[str, Floats]

    def plus(self, other: "Contributions", weight: float) -> "Contributions":
        """Return the sum with the other's contributions times a weight."""
        return Contributions(
            _sum(self.causes, other.causes, weight), _sum(self.columns, other.columns, weight)
        )


def _sum(
    first: Mapping[KeyT, Floats], second: Mapping[KeyT, Floats], weight: float
) -> dict[KeyT, Floats]:
    return {**first} | {key: first.get(key, 0.0) + weight * part for key, part in second.items()}


@dataclass(frozen=True, eq=False)
class Member:
    """An ensemble with the features of N rows that do not follow from their metadata."""

    ensemble: Ensemble
    given: pl.DataFrame
    """[N] `isic_id` and the columns of images and own tables; of an ensemble of networks only,
    their scores."""
    num_threads: int = 0
    _predicts: dict[BoosterKey, Predict] = field(default_factory=dict)
    _contributes: dict[BoosterKey, Contribute] = field(default_factory=dict)

    @property
    def has_boosters(self) -> bool:
        return bool(self.ensemble.manifest["boosters"])

    @cached_property
    def _reference(self) -> dict[str, Scores]:
        """The scores that a blend of libraries ranks among."""
        return self.ensemble.oof_models() if len(self.ensemble.weights) > 1 else {}

    @cached_property
    def attribution(self) -> Attribution:
        return find_causes(self.ensemble)

    def features(self, metadata: pl.DataFrame, given: pl.DataFrame) -> pl.DataFrame:
        """Return the feature table of changed rows; without boosters the scores themselves."""
        if not self.has_boosters:
            return given
        return self.ensemble.frame(metadata, [given])

    def score(self, table: pl.DataFrame, folds: Collection[int] | None) -> Scores:
        """Return the scores by the boosters of some folds, of all folds for None."""
        if not self.has_boosters:
            return image_probability(table)
        chosen = self._encodings(folds)
        keys = [key for key in self._files if key[1] in chosen]
        by_fold = scores_by_fold(keys, self._predict, chosen, table, self.num_threads)
        weights = self.ensemble.weights
        return blend(mean_of_folds(by_fold), weights, self._reference)

    def contributions(self, table: pl.DataFrame, folds: Collection[int] | None) -> Contributions:
        """Return the contributions to the scores of a feature table: means over the boosters."""
        found = self.attribution
        if not self.has_boosters:
            # The score is the logistic function of the mean over networks.
            return Contributions(
                {
                    cause: table[cause.features[0]].fill_null(0.0).to_numpy() / table.width
                    for cause in found.causes
                    if cause.features
                },
                {},
            )
        values = self._mean_contributions(table, folds)
        return Contributions(
            dict(zip(found.causes, (values @ found.of_features).T, strict=True)),
            dict(zip(found.columns, (values @ found.of_columns).T, strict=True)),
        )

    def _mean_contributions(self, table: pl.DataFrame, folds: Collection[int] | None) -> Floats:
        """Return [N, D] the mean contributions of features over the boosters of the folds."""
        weights = self.ensemble.weights
        chosen = self._encodings(folds)
        keys = [key for key in self._files if key[1] in chosen]
        number = Counter(library for library, *_ in keys)
        share = {library: weights[library] / number[library] for library in number}
        total = np.zeros((len(table), len(self.ensemble.state.names)))
        for fold, encoding in chosen.items():
            matrix = encoding.transform(table)
            for key in keys:
                if key[1] == fold:
                    total += share[key[0]] * self._contribute(key)(matrix)
        return total / sum(share[library] * number[library] for library in number)

    def refuse_unexplained(self) -> None:
        """Raise NoContributions if a library does not explain the scores of its boosters."""
        # All boosters of a library have the same parameters.
        for key in {key[0]: key for key in self._files}.values():
            self._contribute(key)

    def _encodings(self, folds: Collection[int] | None) -> dict[int, Encoding]:
        """Return the encodings of some folds, of all folds for None."""
        encodings = self.ensemble.state.encodings
        return {fold: part for fold, part in encodings.items() if folds is None or fold in folds}

    @cached_property
    def _files(self) -> dict[BoosterKey, str]:
        return {
            (entry["library"], entry["fold"], entry["seed"]): entry["file"]
            for entry in self.ensemble.manifest["boosters"]
        }

    def _predict(self, key: BoosterKey) -> Predict:
        if key not in self._predicts:
            path = self.ensemble.root / self._files[key]
            self._predicts[key] = read_booster(path, key[0])
        return self._predicts[key]

    def _contribute(self, key: BoosterKey) -> Contribute:
        if key not in self._contributes:
            text = read_booster_text(self.ensemble.root / self._files[key])
            self._contributes[key] = LIBRARIES[key[0]].contributions(text)
        return self._contributes[key]


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """The N rows of a split, their scores, and the models behind them."""

    scorer: Scorer
    split: Split
    metadata: pl.DataFrame
    score: Scores
    """[N], out of fold for the train split."""
    probability: Scores | None
    """[N] calibrated, likewise; None without a calibration."""
    fold: pl.Series | None
    """[N] the fold that held the row out, None for the test split."""
    members: Mapping[str, Member]
    """By name; the ensemble itself if it is no blend."""
    own: pl.DataFrame | None = None
    """[N] the own columns as `set.column`; None for the train split."""
    is_few: NDArray[np.bool_] | None = None
    """[N] whether a row was scored by the members that do not compare lesions; None for none."""
    to_scale: Callable[[Scores], Scores] | None = None
    """From the scores of the members to `score`; None if they are the same."""

    def of_row(self, row: int) -> "ScoredRows":
        """Return the rows with the members that gave a row its score."""
        return self if self.is_few is None or not self.is_few[row] else self._of_few_lesions

    @cached_property
    def _of_few_lesions(self) -> "ScoredRows":
        assert isinstance(self.scorer, Blend)
        part = self.scorer.single_lesion_part
        members = {name: self.members[name] for name in part.blend.members}
        return replace(
            self, scorer=part.blend, members=members, is_few=None, to_scale=part.to_scale
        )

    def uses_network(self, name: str) -> bool:
        """Return whether the scores are partly by a network, which is not a frozen one."""
        return any(name in each.manifest["embeddings"] for each in ensembles_of(self.scorer))

    def folds_of(self, row: int) -> list[int] | None:
        """Return the folds whose models score a row; None for all of them."""
        return None if self.fold is None else [self.fold[row]]

    def rescore(self, tables: Mapping[str, pl.DataFrame], folds: Sequence[int] | None) -> Scores:
        """Score rows by their feature tables by member, as the ensemble does."""
        scores = {name: member.score(tables[name], folds) for name, member in self.members.items()}
        if not isinstance(self.scorer, Blend):
            (score,) = scores.values()
            return score
        score = blend_ranks(scores, self._weights(folds), self._reference)
        return self.to_scale(score) if self.to_scale else score

    def _weights(self, folds: Sequence[int] | None) -> Mapping[str, float]:
        """Return the weight of each member in the scores by the models of some folds."""
        if not isinstance(self.scorer, Blend):
            return dict.fromkeys(self.members, 1.0)
        return self.scorer.weights if folds is None else self.scorer.weights_by_fold[folds[0]]

    @cached_property
    def _reference(self) -> dict[str, Scores]:
        """The scores that a blend of ensembles ranks among."""
        return self.scorer.oof_models()

    def contributions(
        self, tables: Mapping[str, pl.DataFrame], folds: Sequence[int] | None
    ) -> Contributions:
        """Return the contributions to these scores: of a blend the weighted mean of its members."""
        weights = self._weights(folds)
        total = Contributions({}, {})
        for name, member in self.members.items():
            total = total.plus(member.contributions(tables[name], folds), weights[name])
        return total


def read_test(
    found: TableScores,
    scorer: Scorer,
    metadata: pl.DataFrame,
    sources: EmbeddingSources,
    own_tables: Mapping[str, OwnTable],
    num_threads: int,
) -> ScoredRows:
    """Return the rows of a test table, which the scorer has given the scores `found`."""
    images = {
        name: read_images(member, part, metadata)[0]
        for name, (member, part) in _members(scorer, sources, "test").items()
    }
    members = _with_given(scorer, metadata, images, own_tables, num_threads)
    return ScoredRows(
        scorer,
        "test",
        metadata,
        found.score,
        found.probability,
        None,
        members,
        found.own,
        found.is_few,
    )


def read_out_of_fold(
    scorer: Scorer,
    metadata: pl.DataFrame,
    sources: EmbeddingSources,
    own_tables: Mapping[str, OwnTable],
    num_threads: int,
) -> ScoredRows:
    """Read the out-of-fold scores of the training rows.

    Args:
        metadata: the training table, sorted by id as in the fit.

    Raises:
        UserError: these are not the rows, embeddings or tables of the fit.
    """
    oof = scorer.oof()
    rows = metadata.select(schema.ID).join(oof, on=schema.ID, how="left", maintain_order="left")
    if len(metadata) != len(oof) or rows["blend"].null_count():
        raise UserError(
            f"these are not the {len(oof):,} training rows of {scorer.root}; give the --data that "
            "it was fitted on, or --split test"
        )
    images = {}
    for name, (member, part) in _members(scorer, sources, "train").items():
        images[name] = _read_train_images(member, part, metadata)
    members = _with_given(scorer, metadata, images, own_tables, num_threads)
    score, probability = rows["blend"].to_numpy(), _out_of_fold_probability(scorer, rows)
    return ScoredRows(scorer, "train", metadata, score, probability, rows["fold"], members)


def _out_of_fold_probability(scorer: Scorer, rows: pl.DataFrame) -> Scores | None:
    """Return the calibrated probabilities of training rows with `blend`, `target` and `fold`."""
    if scorer.calibration is None:
        return None
    score, target, fold = (rows[name].to_numpy() for name in ("blend", schema.TARGET, "fold"))
    return out_of_fold_probability(scorer.calibration.method, score, target, fold)


def _members(
    scorer: Scorer, sources: EmbeddingSources, split: Split
) -> dict[str, tuple[Ensemble, EmbeddingSources]]:
    if not isinstance(scorer, Blend):
        return {scorer.root.name: (scorer, sources)}
    own = sources_by_member(scorer, sources, split)
    return {name: (member, own[name]) for name, member in scorer.members.items()}


def _read_train_images(
    ensemble: Ensemble, sources: EmbeddingSources, metadata: pl.DataFrame
) -> ImageRows:
    """Read the image features of training rows, each from the model that held it out."""
    origins = embedding_origins(ensemble.state.image, sources, "train")
    roots = ensemble.state.image.roots(sources, "train")["embeddings"]
    for name, root in roots.items():
        fitted_with = ensemble.manifest["embeddings"][name]
        refuse_other_origin(root, "train", origins["embeddings"][name], fitted_with)
    embeddings, frozen = (
        [root for root in flag if isinstance(root, Path)]
        for flag in (sources.embeddings, sources.frozen)
    )
    return fit_images(ensemble.spec.forms, embeddings, frozen, metadata)[1]


def _with_given(
    scorer: Scorer,
    metadata: pl.DataFrame,
    images: Mapping[str, ImageRows],
    own_tables: Mapping[str, OwnTable],
    num_threads: int,
) -> dict[str, Member]:
    found = {}
    for (name, of_images), ensemble in zip(images.items(), ensembles_of(scorer), strict=True):
        if ensemble.manifest["boosters"]:
            own = [own_tables[table].columns(metadata) for table in ensemble.own_tables]
            tables = [table.drop(schema.ID, strict=False) for table in (*own, *of_images.tables())]
            # With ids, because a table without columns would have no rows.
            given = pl.concat([metadata.select(schema.ID), *tables], how="horizontal")
        else:
            given = of_images.by_column()
        found[name] = Member(ensemble, given, num_threads)
    return found
