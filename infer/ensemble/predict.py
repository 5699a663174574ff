"""Scores the test table with a fitted ensemble and writes the submission. Nothing is fitted here."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import Field

from infer.embedding.store import refuse_other_origin
from infer.ensemble import image_scores
from infer.ensemble.artifact import MANIFEST, Ensemble, open_ensemble
from infer.ensemble.blend import Scores, blend, model_name
from infer.ensemble.boosters import read_booster
from infer.ensemble.image_features import Sources, frames, origins
from infer.ensemble.lesions import too_few
from isic import schema
from isic.dataset import Dataset
from isic.features import needed_columns, unseen_categories
from isic.metadata import read_ids, read_metadata, require
from isic.runtime.config import Settings
from isic.runtime.errors import UserError, warn
from isic.runtime.files import (
    atomic_path,
    holds,
    manifest_path,
    refuse_foreign,
    sha256,
    versions,
    write_manifest,
    write_parquet,
)
from isic.runtime.machine import num_cores

MAX_NAMED = 5
"""Unseen values of a column that are named."""


class PredictSettings(Settings):
    """Settings of `infer predict`."""

    data: Path = Field(Path("data/isic-2024"), description="dataset folder")
    ensemble: Path = Field(
        Path("outputs/ensemble"),
        description="an ensemble's folder, or one with a single ensemble in it",
    )
    embeddings: Path | None = Field(
        None, description="outputs/embeddings/<config>, where the ensemble uses the fold models"
    )
    frozen: Path | None = Field(
        None, description="the frozen model's embeddings, where the ensemble uses them"
    )
    output: Path = Field(Path("submission.csv"), description="the submission to write")
    few: Literal["warn", "refuse"] = Field(
        "warn",
        description="when patients have fewer lesions than nearly all in training and features are "
        "relative to the patient",
    )
    num_threads: int = Field(0, ge=0, description="threads, 0 for all")


def predict(settings: PredictSettings) -> None:
    """Scores the test table with a fitted ensemble and writes the submission. The settings' fields are the flags."""
    ensemble = open_ensemble(settings.ensemble)
    dataset = Dataset(settings.data)
    path = dataset.metadata_path("test")
    metadata = read_metadata(path)
    require(metadata, needed_columns(ensemble.spec.tabular), path)
    _check_lesions(ensemble, metadata, settings.few)
    order = submission_order(dataset, metadata)
    _refuse_foreign(settings.output)
    image, made_with = _image(settings, ensemble, metadata)
    table = ensemble.spec.frame(metadata, image)
    _warn_unseen(ensemble, table)
    models = score_models(ensemble, table, settings.num_threads or num_cores())
    reference = ensemble.oof_models() if len(ensemble.weights) > 1 else {}
    score = np.clip(blend(models, ensemble.weights, reference), 0.0, 1.0)
    assert np.isfinite(score).all()
    scored = metadata.select(schema.ID, pl.Series(schema.TARGET, score))
    submission = order.join(scored, on=schema.ID, maintain_order="left")
    all_models = metadata.select(schema.ID).with_columns(**models, blend=score)
    with atomic_path(settings.output) as first, atomic_path(models_path(settings.output)) as second:
        submission.write_csv(first)
        write_parquet(second, all_models)
        # before they get their names, so that a run that is killed in between can be repeated
        write_manifest(
            settings.output,
            first,
            ensemble=sha256(ensemble.root / MANIFEST),
            folds_digest=ensemble.manifest["folds_digest"],
            features=ensemble.manifest["features"],
            **made_with,
            metadata_sha256=sha256(path),
            models={"file": models_path(settings.output).name, "sha256": sha256(second)},
            versions=versions("isic-toolkit", *ensemble.manifest["versions"]),
        )
    print(
        f"submission: {settings.output} ({len(metadata)} rows, scores {score.min():.4f} to {score.max():.4f})"
    )


def _refuse_foreign(output: Path) -> None:
    """Raise a UserError if the submission would replace anything but one that `predict` wrote, by its manifest."""
    manifest = manifest_path(output)
    is_own = holds(manifest, "artifact", "ensemble", "models")
    refuse_foreign([output, models_path(output), manifest], is_own, "--output")


def _check_lesions(ensemble: Ensemble, metadata: pl.DataFrame, few: str) -> None:
    """Warns of patients with too few lesions to compare one with the others, or raises a UserError."""
    training = ensemble.manifest["lesions_per_patient"]
    problem = too_few(metadata, training) if ensemble.relative else None
    if problem and few == "refuse":
        raise UserError(f"{problem}; add their other lesions, or use an ensemble of raw features")
    if problem:
        warn(problem)


def _warn_unseen(ensemble: Ensemble, table: pl.DataFrame) -> None:
    """Names the categories that no training row has."""
    unseen = unseen_categories(table, ensemble.state.encodings.values())
    for name, rows in unseen.items():
        values = [f'"{value}" ({number:,} rows)' for value, number in rows.items()]
        more = f" and {len(values) - MAX_NAMED:,} more" if len(values) > MAX_NAMED else ""
        warn(
            f"{name} has values that no training row has, scored as unknown: "
            f"{', '.join(values[:MAX_NAMED])}{more}",
        )


def models_path(submission: Path) -> Path:
    """The probabilities of each model beside `submission.csv`: `submission_models.parquet`."""
    return submission.with_name(f"{submission.stem}_models.parquet")


def score_models(ensemble: Ensemble, table: pl.DataFrame, num_threads: int) -> dict[str, Scores]:
    """Returns each model's probabilities: the mean over its folds' boosters, or the image model's score as one.

    Args:
        table: feature table of N rows.

    Returns:
        [N] float64 by the model's name, as in `oof.parquet`.
    """
    boosters = ensemble.manifest["boosters"]
    if not boosters:
        return {"image": image_scores.probability(table)}
    totals = {
        model_name(entry["library"], entry["seed"]): np.zeros(len(table)) for entry in boosters
    }
    for fold, encoding in ensemble.state.encodings.items():
        matrix = encoding.transform(table)
        for entry in (entry for entry in boosters if entry["fold"] == fold):
            score = read_booster(ensemble.root / entry["file"], entry["library"])(
                matrix, num_threads
            )
            totals[model_name(entry["library"], entry["seed"])] += score
    return {name: total / len(ensemble.state.encodings) for name, total in totals.items()}


def submission_order(dataset: Dataset, metadata: pl.DataFrame) -> pl.DataFrame:
    """Returns the ids in the order to write: the sample submission's where the dataset has one, else the table's.

    Raises:
        UserError: the sample and the table do not have the same ids.
    """
    path = dataset.sample_submission_path
    if not path.is_file():
        return metadata.select(schema.ID)
    order = read_ids(path).to_frame()  # its target is a placeholder such as 0.3
    for ids, other, here, there in (
        (order, metadata, path, "the table"),
        (metadata, order, "the table", path),
    ):
        extra = ids.join(other, on=schema.ID, how="anti", maintain_order="left")[schema.ID]
        if len(extra):
            raise UserError(
                f"{len(extra)} of the {len(ids)} ids in {here} are not in {there}, the first is {extra[0]}; "
                f"use the sample submission of this dataset, or take {path.name} away"
            )
    return order


def _image(
    settings: PredictSettings, ensemble: Ensemble, metadata: pl.DataFrame
) -> tuple[list[pl.DataFrame], dict[str, Any]]:
    """The image features and where the embeddings come from."""
    state, digest = ensemble.state.image, ensemble.manifest["folds_digest"]
    sources = Sources(settings.embeddings, settings.frozen)
    for flag, needed in state.needs.items():
        if needed and getattr(sources, flag) is None:
            config = ensemble.manifest[flag]["config"]
            raise UserError(
                f"{ensemble.root} uses images; give --{flag} outputs/embeddings/{config}"
            )
    found = origins(state, sources, "test", digest)
    if settings.embeddings and (fitted := ensemble.manifest["embeddings"]):
        refuse_other_origin(settings.embeddings, "test", found["embeddings"], fitted)
    return frames(state, sources, "test", metadata, digest, None), found
