"""Score the rows of a table with a fitted ensemble or blend. Nothing is fitted or written here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.embedding.store import Embeddings, refuse_other_origin
from infer.ensemble.artifact import Ensemble
from infer.ensemble.blends.artifact import Blend, Scorer, ensembles_of
from infer.ensemble.blends.ranks import Scores, blend, model_name, seeds_of
from infer.ensemble.boosting.libraries import read_booster
from infer.ensemble.boosting.out_of_fold import mean_of_folds, scores_by_fold
from infer.ensemble.features.own_tables import OwnTable
from infer.ensemble.images.features import ImageRows, embedding_origins, read_image_rows
from infer.ensemble.images.networks import match_networks
from infer.ensemble.images.scores import image_probability
from infer.ensemble.lesions import few_lesions_warning, has_few_lesions
from infer.ensemble.settings import SOURCES, EmbeddingSources, Few
from isic import schema
from isic.dataset import Split
from isic.features import unseen_categories
from isic.layout import OOF_FILE
from isic.metadata import require
from isic.runtime.errors import UserError, first_of, warn
from isic.runtime.machine import num_cores
from isic.tables import read_parquet

MAX_NAMED_VALUES = 5
"""Unseen values of a column that a warning names."""


@dataclass(frozen=True)
class TableScores:
    """Scores of the N rows of a table."""

    models: dict[str, Scores]
    """[N] by model, or by member of a blend."""
    score: Scores
    """[N] in [0, 1]."""
    origins: dict[str, Any]
    """Fields of the manifest: `embeddings` and `frozen`; of a blend `origins`, these by member."""
    std: Scores | None = None
    """[N] standard deviation of the score over folds and seeds; of ensembles with more than one
    booster per library."""
    probability: Scores | None = None
    """[N] calibrated probabilities, if the ensemble has a curve; NaN for rows that are scored
    without comparing lesions, whose scores it was not fitted on."""
    is_few: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    """[N] whether a row was scored without comparing lesions, because its patient has few; of
    `score_table`."""
    own: pl.DataFrame = field(default_factory=pl.DataFrame)
    """[N] the own columns as `set.column`."""
    unseen: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Rows by column and category that no training row has."""

    def replaced(self, rows: NDArray[np.bool_], others: Scores) -> "TableScores":
        """Return the scores with `others` [N] in some rows, which then have no std, probability."""
        std, probability = (
            None if values is None else np.where(rows, np.nan, values)
            for values in (self.std, self.probability)
        )
        score = np.where(rows, others, self.score)
        return replace(self, score=score, std=std, probability=probability)


def score_table(
    scorer: Scorer,
    metadata: pl.DataFrame,
    sources: EmbeddingSources,
    own_tables: Mapping[str, OwnTable],
    num_threads: int = 0,
    few: Few = "warn",
    source: Path | str = "the metadata",
) -> TableScores:
    """Score the rows of a table, each at its place.

    Warns of rows that were in the fit and of unseen categories.

    Args:
        metadata: as `isic.metadata.check_metadata` returns it.
        own_tables: those of `scorer.own_tables`.
        num_threads: 0 for all cores.
        few: for patients with few lesions, if scores compare lesions: `warn`, `refuse`, or `raw`
            for the members of a blend that do not.
        source: origin of the metadata, for messages.

    Raises:
        UserError: columns or embeddings are missing or others than in the fit, or patients have
            few lesions and `few` refuses them or nothing scores single lesions.
    """
    for ensemble in ensembles_of(scorer):
        require(metadata, ensemble.spec.needed_columns, source)
    _warn_of_training_rows(scorer, metadata)
    is_few = _few_lesions(scorer, metadata, few)
    num_threads = num_threads or num_cores()
    if isinstance(scorer, Blend):
        found = _score_blend(scorer, metadata, sources, own_tables, num_threads, is_few)
    else:
        found = score_ensemble(scorer, metadata, sources, own_tables, num_threads)
    _warn_unseen(found.unseen)
    # Rounding may lead a mean of probabilities beyond 0 or 1 by a last bit.
    score = np.clip(found.score, 0.0, 1.0)
    assert np.isfinite(score).all()
    probability = scorer.calibration.probability(score) if scorer.calibration else None
    if probability is not None:
        probability[is_few] = np.nan
    return replace(found, score=score, probability=probability, is_few=is_few)


def _warn_of_training_rows(scorer: Scorer, metadata: pl.DataFrame) -> None:
    """Warn of rows that the models have learned, whose scores tell nothing of other rows."""
    fitted = read_parquet(scorer.root / OOF_FILE, [schema.ID])
    known = metadata.select(schema.ID).join(fitted, on=schema.ID, how="semi")[schema.ID].sort()
    if len(known):
        warn(
            f"{len(known):,} of {len(metadata):,} rows, such as {known[0]}, were in the fit, so "
            f"their scores are too good; their out-of-fold scores are in the ensemble's {OOF_FILE}"
        )


def _score_blend(
    scorer: Blend,
    metadata: pl.DataFrame,
    sources: EmbeddingSources,
    own_tables: Mapping[str, OwnTable],
    num_threads: int,
    is_few: NDArray[np.bool_],
) -> TableScores:
    """Score the rows of a table; those of `is_few` by the members that do not compare lesions."""
    own_sources = sources_by_member(scorer, sources, "test")
    members = {
        name: score_ensemble(member, metadata, own_sources[name], own_tables, num_threads)
        for name, member in scorer.members.items()
    }
    models = {name: member.score for name, member in members.items()}
    score = scorer.score(models)
    if is_few.any():
        score[is_few] = scorer.score_of_single_lesions(models)[is_few]
    # Under one key, because a member may have the name of another field of the manifest.
    origins = {"origins": {name: member.origins for name, member in members.items()}}
    own = pl.DataFrame({each.name: each for part in members.values() for each in part.own})
    unseen: dict[str, Mapping[str, int]] = {}
    for part in members.values():
        for column, rows in part.unseen.items():
            unseen[column] = {**unseen.get(column, {}), **rows}
    return TableScores(models, score, origins, own=own, unseen=unseen)


def score_ensemble(
    ensemble: Ensemble,
    metadata: pl.DataFrame,
    sources: EmbeddingSources,
    own_tables: Mapping[str, OwnTable],
    num_threads: int,
) -> TableScores:
    """Score the rows of a table with one ensemble, which may use a part of `own_tables`."""
    images, origins = read_images(ensemble, sources, metadata)
    own_columns = [own_tables[name].columns(metadata) for name in ensemble.own_tables]
    table = ensemble.frame(metadata, [*own_columns, *images.tables()])
    unseen = unseen_categories(table, ensemble.state.encodings.values())
    weights = ensemble.weights
    # Only a blend of several libraries needs the ranks of the training rows.
    reference = ensemble.oof_models() if len(weights) > 1 else {}
    if not ensemble.manifest["boosters"]:
        models = {"image": image_probability(images.by_column())}
        return TableScores(models, blend(models, weights, reference), origins, unseen=unseen)
    by_fold = _score_by_fold(ensemble, table, num_threads)
    models = mean_of_folds(by_fold)
    std = _std(by_fold, weights, reference)
    own = ensemble.spec.own_by_set(table)
    score = blend(models, weights, reference)
    return TableScores(models, score, origins, std, own=own, unseen=unseen)


def _few_lesions(scorer: Scorer, metadata: pl.DataFrame, few: Few) -> NDArray[np.bool_]:
    """Return [N] whether a row is to be scored without comparing lesions, as `raw` requests."""
    none = np.zeros(len(metadata), bool)
    if few == "raw" and not (isinstance(scorer, Blend) and scorer.single_lesion_members):
        raise UserError(
            f"--few raw needs a blend with an ensemble of features that do not compare a patient's "
            f"lesions, such as --features raw; {scorer.root} has none with a weight"
        )
    if not scorer.is_relative:
        return none
    training = scorer.manifest["lesions_per_patient"]
    problem = few_lesions_warning(metadata, training)
    if problem is None:
        return none
    if few == "raw":
        return has_few_lesions(metadata, training)
    if few == "refuse":
        raise UserError(f"{problem}; add their other lesions, or use an ensemble of raw features")
    warn(problem)
    return none


def _warn_unseen(unseen: Mapping[str, Mapping[str, int]]) -> None:
    """Warn of categories that no training row has: numbers of rows by column and category."""
    for name, rows in unseen.items():
        values = [f'"{value}" ({number:,} rows)' for value, number in rows.items()]
        warn(
            f"{name} has values that no training row has, scored as unknown: "
            f"{first_of(values, MAX_NAMED_VALUES)}"
        )


def score_models(ensemble: Ensemble, table: pl.DataFrame, num_threads: int) -> dict[str, Scores]:
    """Return each model's probabilities, [N] float64: the mean over its folds' boosters."""
    return mean_of_folds(_score_by_fold(ensemble, table, num_threads))


def _score_by_fold(
    ensemble: Ensemble, table: pl.DataFrame, num_threads: int
) -> list[dict[str, Scores]]:
    files = {
        (entry["library"], entry["fold"], entry["seed"]): ensemble.root / entry["file"]
        for entry in ensemble.manifest["boosters"]
    }
    return scores_by_fold(
        files,
        lambda key: read_booster(files[key], key[0]),
        ensemble.state.encodings,
        table,
        num_threads,
    )


def _std(
    by_fold: Sequence[Mapping[str, Scores]],
    weights: Mapping[str, float],
    reference: Mapping[str, Scores],
) -> Scores | None:
    """Return [N] the standard deviation of the scores by each fold's models of each seed.

    None if there is one such score only. `reference` as for `blend`.
    """
    scores = [
        blend(
            {model_name(library, seed): models[model_name(library, seed)] for library in weights},
            weights,
            reference,
        )
        for models in by_fold
        for seed in seeds_of(models, weights)
    ]
    return np.asarray(np.std(scores, axis=0, ddof=1)) if len(scores) > 1 else None


def sources_by_member(
    scorer: Blend, sources: EmbeddingSources, split: Split
) -> dict[str, EmbeddingSources]:
    """Return each member's embeddings among those of all members.

    Raises:
        UserError: the embeddings of a member's network are not among them, or those of others are.
    """
    found: dict[str, dict[str, tuple[Embeddings, ...]]] = {name: {} for name in scorer.members}
    for flag in SOURCES:
        needs = {name: list(member.manifest[flag]) for name, member in scorer.members.items()}
        networks = sorted({network for needed in needs.values() for network in needed})
        if not networks:
            continue
        roots = match_networks(flag, getattr(sources, flag), split, networks)
        for name, needed in needs.items():
            found[name][flag] = tuple(roots[network] for network in needed)
    return {name: EmbeddingSources(**flags) for name, flags in found.items()}


def read_images(
    ensemble: Ensemble, sources: EmbeddingSources, metadata: pl.DataFrame
) -> tuple[ImageRows, dict[str, Any]]:
    """Return the image features, and the origins of the embeddings.

    Raises:
        UserError: embeddings are missing, or differ in origin from those of the fit.
    """
    state = ensemble.state.image
    origins = embedding_origins(state, sources, "test")
    for name, root in state.roots(sources, "test")["embeddings"].items():
        fitted_with = ensemble.manifest["embeddings"][name]
        refuse_other_origin(root, "test", origins["embeddings"][name], fitted_with)
    return read_image_rows(state, sources, "test", metadata), origins
