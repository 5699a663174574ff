"""Score the test table with a fitted ensemble and write the submission. Nothing is fitted here."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from infer.embedding.store import refuse_other_origin
from infer.ensemble.artifact import ENSEMBLE_FILE, Ensemble, open_ensemble
from infer.ensemble.blend import Scores, blend, model_name
from infer.ensemble.boosters import read_booster
from infer.ensemble.image_features import embedding_origins, image_feature_tables
from infer.ensemble.image_scores import image_probability
from infer.ensemble.lesions import few_lesions_warning
from infer.ensemble.own_tables import read_test_tables
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


def predict_submission(settings: PredictSettings) -> None:
    """Run `infer predict`, which its settings describe."""
    ensemble = open_ensemble(settings.ensemble)
    dataset = Dataset(settings.data)
    path = dataset.metadata_path("test")
    metadata = read_metadata(path)
    require(metadata, ensemble.spec.needed_columns, path)
    _check_lesions(ensemble, metadata, settings.few)
    order = submission_order(dataset, metadata)
    _refuse_foreign(settings.output)
    own_tables = read_test_tables(settings.tables, ensemble.spec.own.tables)
    sources = EmbeddingSources(settings.embeddings, settings.frozen)
    image_tables, origins = _read_images(ensemble, sources, metadata)
    own_columns = [own.columns(metadata) for own in own_tables.values()]
    table = ensemble.spec.frame(metadata, [*own_columns, *image_tables])
    _warn_unseen(ensemble, table)
    models = score_models(ensemble, table, settings.num_threads or num_cores())
    # Only a blend of several libraries needs the ranks of the training rows.
    reference = ensemble.oof_models() if len(ensemble.weights) > 1 else {}
    # Rounding may lead a mean of probabilities beyond 0 or 1 by a last bit.
    score = np.clip(blend(models, ensemble.weights, reference), 0.0, 1.0)
    assert np.isfinite(score).all()
    scored = metadata.select(schema.ID, pl.Series(schema.TARGET, score))
    submission = order.join(scored, on=schema.ID, maintain_order="left")
    all_models = metadata.select(schema.ID).with_columns(**models, blend=score)
    origins["metadata_sha256"] = sha256(path)
    origins["tables"] = {name: sha256(own.path) for name, own in own_tables.items()}
    _write_submission(settings.output, submission, all_models, ensemble, origins)
    print(
        f"submission: {settings.output} ({len(metadata)} rows, "
        f"scores {score.min():.4f} to {score.max():.4f})"
    )


def _write_submission(
    output: Path,
    submission: pl.DataFrame,
    all_models: pl.DataFrame,
    ensemble: Ensemble,
    origins: dict[str, Any],
) -> None:
    models_file = models_path(output)
    with atomic_path(output) as submission_path, atomic_path(models_file) as models_temporary:
        submission.write_csv(submission_path)
        write_parquet(models_temporary, all_models)
        # The manifest comes before the files get their names: it shows that they are this
        # command's own, so a run that is killed in between can be repeated.
        write_manifest(
            output,
            submission_path,
            ensemble=sha256(ensemble.root / ENSEMBLE_FILE),
            folds_digest=ensemble.manifest["folds_digest"],
            features=ensemble.manifest["features"],
            **origins,
            models={"file": models_file.name, "sha256": sha256(models_temporary)},
            versions=versions("isic-toolkit", *ensemble.manifest["versions"]),
        )


def _refuse_foreign(output: Path) -> None:
    """Raise a UserError if a file would be replaced that `infer predict` did not write."""
    manifest = manifest_path(output)
    is_own = holds(manifest, "artifact", "ensemble", "models")
    refuse_foreign([output, models_path(output), manifest], is_own, "--output")


def _check_lesions(ensemble: Ensemble, metadata: pl.DataFrame, few: str) -> None:
    """Warn of patients with too few lesions to compare with each other, or raise a UserError."""
    if not ensemble.is_relative:
        return
    problem = few_lesions_warning(metadata, ensemble.manifest["lesions_per_patient"])
    if problem is None:
        return
    if few == "refuse":
        raise UserError(f"{problem}; add their other lesions, or use an ensemble of raw features")
    warn(problem)


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
    """Return each model's probabilities, [N] float64: the mean over its folds' boosters.

    Without boosters, the only model is the image model.
    """
    boosters = ensemble.manifest["boosters"]
    if not boosters:
        return {"image": image_probability(table)}
    names = [model_name(entry["library"], entry["seed"]) for entry in boosters]
    totals = {name: np.zeros(len(table)) for name in names}
    for fold, encoding in ensemble.state.encodings.items():
        matrix = encoding.transform(table)
        for name, entry in zip(names, boosters, strict=True):
            if entry["fold"] == fold:
                predict = read_booster(ensemble.root / entry["file"], entry["library"])
                totals[name] += predict(matrix, num_threads)
    return {name: total / len(ensemble.state.encodings) for name, total in totals.items()}


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


def _read_images(
    ensemble: Ensemble, sources: EmbeddingSources, metadata: pl.DataFrame
) -> tuple[list[pl.DataFrame], dict[str, Any]]:
    """Return the tables of image features, and the origins of the embeddings.

    Raises:
        UserError: embeddings are not given, missing, or differ in origin from those of the fit.
    """
    state = ensemble.state.image
    folds_digest = ensemble.manifest["folds_digest"]
    for flag, needed in state.needs.items():
        if needed and getattr(sources, flag) is None:
            config = ensemble.manifest[flag]["config"]
            raise UserError(
                f"{ensemble.root} uses images; give --{flag} outputs/embeddings/{config}"
            )
    origins = embedding_origins(state, sources, "test", folds_digest)
    fitted_with = ensemble.manifest["embeddings"]
    if sources.embeddings and fitted_with:
        refuse_other_origin(sources.embeddings, "test", origins["embeddings"], fitted_with)
    tables = image_feature_tables(state, sources, "test", metadata, folds_digest, folds=None)
    return tables, origins
