"""Score the test table with a fitted ensemble and write the submission. Nothing is fitted here."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.embedding.store import refuse_other_origin
from infer.ensemble.artifact import ENSEMBLE_FILE, Ensemble
from infer.ensemble.blends.artifact import Blend, Scorer, ensembles_of, open_scorer
from infer.ensemble.blends.ranks import Scores, blend
from infer.ensemble.boosting.libraries import read_booster
from infer.ensemble.boosting.out_of_fold import mean_over_folds
from infer.ensemble.boosting.refit import ESTIMATES, choose_rows
from infer.ensemble.features.own_tables import OwnTable, read_test_tables
from infer.ensemble.images.features import ImageRows, embedding_origins, read_image_rows
from infer.ensemble.images.networks import match_networks
from infer.ensemble.images.scores import image_probability
from infer.ensemble.lesions import few_lesions_warning, has_few_lesions
from infer.ensemble.settings import EmbeddingSources, PredictSettings
from isic import schema
from isic.dataset import Dataset
from isic.features import unseen_categories
from isic.metadata import read_ids, read_metadata, require
from isic.runtime.errors import UserError, warn
from isic.runtime.files import (
    atomic_path,
    holds,
    manifest_path,
    refuse_foreign,
    sha256,
    versions,
    write_manifest,
)
from isic.runtime.machine import num_cores
from isic.tables import write_parquet

MAX_NAMED_VALUES = 5
"""Unseen values of a column that a warning names."""


@dataclass(frozen=True)
class TestScores:
    """Scores of the N rows of a test table."""

    models: dict[str, Scores]
    """[N] by model, or by member of a blend."""
    score: Scores
    """[N] in [0, 1]."""
    origins: dict[str, Any]
    """Fields of the manifest: `embeddings` and `frozen`; of a blend `origins`, these by member."""


@dataclass(frozen=True)
class TestTable:
    """The rows to score, and the order of the submission."""

    dataset: Dataset
    path: Path
    metadata: pl.DataFrame
    """[N] the table, in its own order."""
    order: pl.DataFrame
    """[N] `isic_id` in the order of the submission."""

    @cached_property
    def sha256(self) -> str:
        return sha256(self.path)


def read_test_table(dataset: Dataset) -> TestTable:
    """Read the test split's table and the sample submission, if there is one.

    Raises:
        UserError: the table is missing or malformed, or the sample has other ids.
    """
    path = dataset.metadata_path("test")
    metadata = read_metadata(path)
    return TestTable(dataset, path, metadata, submission_order(dataset, metadata))


def predict_submission(settings: PredictSettings) -> None:
    """Run `infer predict`, which its settings describe."""
    sources = EmbeddingSources(settings.embeddings, settings.frozen)
    scorer = choose_rows(open_scorer(settings.ensemble), settings.rows, sources)
    test = read_test_table(Dataset(settings.data))
    require_columns(scorer, test.metadata, test.path)
    few = few_lesions(scorer, test.metadata, settings.few)
    refuse_foreign_submission(settings.output)
    own_tables = read_test_tables(settings.tables, scorer.own_tables)
    num_threads = settings.num_threads or num_cores()
    found = score_table(scorer, test.metadata, sources, own_tables, num_threads, few)
    origins = {
        **found.origins,
        "tables": {name: sha256(own.path) for name, own in own_tables.items()},
        "rows": settings.rows,
        "out_of_fold_scores": ESTIMATES[settings.rows],
    }
    score = write_submission(settings.output, test, found.models, found.score, scorer, origins)
    print(
        f"submission: {settings.output} ({len(score)} rows, "
        f"scores {score.min():.4f} to {score.max():.4f})"
    )


def require_columns(scorer: Scorer, metadata: pl.DataFrame, path: Path) -> None:
    """Raise a UserError if the table lacks a column that a feature needs."""
    for ensemble in ensembles_of(scorer):
        require(metadata, ensemble.spec.needed_columns, path)


def score_table(
    scorer: Scorer,
    metadata: pl.DataFrame,
    sources: EmbeddingSources,
    own_tables: Mapping[str, OwnTable],
    num_threads: int,
    few: NDArray[np.bool_],
) -> TestScores:
    """Score the rows of a test table.

    Args:
        few: [N] rows to score by the members of a blend that do not compare lesions.
    """
    if isinstance(scorer, Ensemble):
        return score_ensemble(scorer, metadata, sources, own_tables, num_threads)
    own_sources = _sources_by_member(scorer, sources)
    members = {
        name: score_ensemble(member, metadata, own_sources[name], own_tables, num_threads)
        for name, member in scorer.members.items()
    }
    models = {name: member.score for name, member in members.items()}
    score = scorer.score(models)
    if few.any():
        score[few] = scorer.score_of_single_lesions(models)[few]
    # Under one key, because a member may have the name of another field of the manifest.
    origins = {"origins": {name: member.origins for name, member in members.items()}}
    return TestScores(models, score, origins)


def score_ensemble(
    ensemble: Ensemble,
    metadata: pl.DataFrame,
    sources: EmbeddingSources,
    own_tables: Mapping[str, OwnTable],
    num_threads: int,
) -> TestScores:
    """Score the rows of a test table with one ensemble, which may use a part of `own_tables`."""
    images, origins = _read_images(ensemble, sources, metadata)
    own_columns = [own_tables[name].columns(metadata) for name in ensemble.own_tables]
    table = ensemble.spec.frame(metadata, [*own_columns, *images.tables()])
    _warn_unseen(ensemble, table)
    if ensemble.manifest["boosters"]:
        models = score_models(ensemble, table, num_threads)
    else:
        models = {"image": image_probability(images.by_column())}
    # Only a blend of several libraries needs the ranks of the training rows.
    reference = ensemble.oof_models() if len(ensemble.weights) > 1 else {}
    return TestScores(models, blend(models, ensemble.weights, reference), origins)


def write_submission(
    output: Path,
    test: TestTable,
    models: Mapping[str, Scores],
    score: Scores,
    scorer: Scorer,
    origins: Mapping[str, Any],
) -> Scores:
    """Write a submission, the scores of each model, and the manifest of both.

    Args:
        output: the submission's path.
        test: the N rows.
        models: [N] by model, in the order of the table.
        score: [N].
        scorer: the ensemble that made the scores.
        origins: more fields of the manifest.

    Returns:
        [N] the submitted scores, in [0, 1].
    """
    # Rounding may lead a mean of probabilities beyond 0 or 1 by a last bit.
    score = np.clip(score, 0.0, 1.0)
    assert np.isfinite(score).all()
    scored = test.metadata.select(schema.ID, pl.Series(schema.TARGET, score))
    submission = test.order.join(scored, on=schema.ID, maintain_order="left")
    all_models = test.metadata.select(schema.ID).with_columns(**models, blend=score)
    models_file = models_path(output)
    with atomic_path(output) as submission_path, atomic_path(models_file) as models_temporary:
        submission.write_csv(submission_path)
        write_parquet(models_temporary, all_models)
        # The manifest comes before the files get their names: it shows that they are this
        # command's own, so a run that is killed in between can be repeated.
        write_manifest(
            output,
            submission_path,
            ensemble=sha256(scorer.root / ENSEMBLE_FILE),
            folds_digest=scorer.manifest["folds_digest"],
            **_describe(scorer),
            **{"metadata_sha256": test.sha256, **origins},
            models={"file": models_file.name, "sha256": sha256(models_temporary)},
            versions=versions("isic-toolkit", *scorer.manifest["versions"]),
        )
    return score


def _describe(scorer: Scorer) -> dict[str, Any]:
    """Return the manifest's field on the features, or on the members and weights of a blend."""
    keys = ("members", "weights") if isinstance(scorer, Blend) else ("features",)
    return {key: scorer.manifest[key] for key in keys}


def refuse_foreign_submission(output: Path) -> None:
    """Raise a UserError if a file would be replaced that `infer predict` did not write."""
    manifest = manifest_path(output)
    is_own = holds(manifest, "artifact", "ensemble", "models")
    refuse_foreign([output, models_path(output), manifest], is_own, "--output")


def few_lesions(scorer: Scorer, metadata: pl.DataFrame, few: str) -> NDArray[np.bool_]:
    """Return [N] the rows of patients with too few lesions, to be scored without comparing them.

    Args:
        few: `warn` (of these patients), `refuse` (them), or `raw`: the only one with such rows.

    Raises:
        UserError: there are such patients and `few` is `refuse`, or `raw` and nothing else can
            score them.
    """
    none = np.zeros(len(metadata), bool)
    if few == "raw" and not (isinstance(scorer, Blend) and scorer.single_lesion_members):
        raise UserError(
            f"--few raw needs a blend with an ensemble of features that do not compare a patient's "
            f"lesions, such as --features raw; {scorer.root} has none"
        )
    if not scorer.is_relative:
        return none
    training = scorer.manifest["lesions_per_patient"]
    problem = few_lesions_warning(metadata, training)
    if problem is None:
        return none
    if few == "raw":
        rows = has_few_lesions(metadata, training)
        print(f"{rows.sum():,} rows of patients with few lesions are scored by raw features")
        return rows
    if few == "refuse":
        raise UserError(f"{problem}; add their other lesions, or use an ensemble of raw features")
    warn(problem)
    return none


def _warn_unseen(ensemble: Ensemble, table: pl.DataFrame) -> None:
    """Warn of categories that no training row has."""
    unseen = unseen_categories(table, ensemble.state.encodings.values())
    for name, rows in unseen.items():
        values = [f'"{value}" ({number:,} rows)' for value, number in rows.items()]
        num_more = len(values) - MAX_NAMED_VALUES
        more = f" and {num_more:,} more" if num_more > 0 else ""
        warn(
            f"{name} has values that no training row has, scored as unknown: "
            f"{', '.join(values[:MAX_NAMED_VALUES])}{more}",
        )


def models_path(submission: Path) -> Path:
    """Return the path for the probabilities of each model: `submission_models.parquet`."""
    return submission.with_name(f"{submission.stem}_models.parquet")


def score_models(ensemble: Ensemble, table: pl.DataFrame, num_threads: int) -> dict[str, Scores]:
    """Return each model's probabilities, [N] float64: the mean over its folds' boosters."""
    files = {
        (entry["library"], entry["fold"], entry["seed"]): ensemble.root / entry["file"]
        for entry in ensemble.manifest["boosters"]
    }
    return mean_over_folds(
        files,
        lambda key: read_booster(files[key], key[0]),
        ensemble.state.encodings,
        table,
        num_threads,
    )


def submission_order(dataset: Dataset, metadata: pl.DataFrame) -> pl.DataFrame:
    """Return the ids in the order of the sample submission, or of the table if there is none.

    Raises:
        UserError: the sample and the table do not have the same ids.
    """
    path = dataset.sample_submission_path
    if not path.is_file():
        return metadata.select(schema.ID)
    order = read_ids(path).to_frame()  # the sample's target is a placeholder such as 0.3
    _refuse_extra(order, metadata, str(path), "the table", path.name)
    _refuse_extra(metadata, order, "the table", str(path), path.name)
    return order


def _refuse_extra(
    ids: pl.DataFrame, others: pl.DataFrame, source: str, other_source: str, sample: str
) -> None:
    """Raise a UserError if some ids are not among the others."""
    extra = ids.join(others, on=schema.ID, how="anti", maintain_order="left")[schema.ID]
    if len(extra):
        raise UserError(
            f"{len(extra)} of the {len(ids)} ids in {source} are not in {other_source}, the first "
            f"is {extra[0]}; use the sample submission of this dataset, or remove {sample}"
        )


def _sources_by_member(scorer: Blend, sources: EmbeddingSources) -> dict[str, EmbeddingSources]:
    """Return each member's embeddings among those of all members.

    Raises:
        UserError: the embeddings of a member's network are not among them, or those of others are.
    """
    found: dict[str, dict[str, tuple[Path, ...]]] = {name: {} for name in scorer.members}
    for flag in ("embeddings", "frozen"):
        needs = {name: list(member.manifest[flag]) for name, member in scorer.members.items()}
        networks = sorted({network for needed in needs.values() for network in needed})
        if not networks:
            continue
        roots = match_networks(flag, getattr(sources, flag), "test", networks)
        for name, needed in needs.items():
            found[name][flag] = tuple(roots[network] for network in needed)
    return {name: EmbeddingSources(**flags) for name, flags in found.items()}


def _read_images(
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
    return read_image_rows(state, sources, "test", metadata, out_of_fold=False), origins
