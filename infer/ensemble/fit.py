"""Fit an ensemble and write it with its out-of-fold scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.ensemble.artifact import (
    SCORES_FILE,
    TRAINING_FILE,
    EnsembleState,
    clear_ensemble,
    refuse_foreign_folder,
    refuse_other_ensemble,
    write_calibration,
    write_ensemble_manifest,
)
from infer.ensemble.blends.artifact import mean_of_models
from infer.ensemble.blends.ranks import blend
from infer.ensemble.boosting.libraries import LIBRARIES, booster_entries, write_boosters
from infer.ensemble.boosting.out_of_fold import FitResult, fit_boosters
from infer.ensemble.boosting.refit import describe_agreement, refit_boosters
from infer.ensemble.boosting.splits import Plans, fit_plans, summarise_plans, write_plans
from infer.ensemble.drift import Summary, summarise_own, summarise_table, summary_to_json
from infer.ensemble.features.own_tables import OwnTable
from infer.ensemble.features.spec import FeatureSpec
from infer.ensemble.images.features import ImageState, embedding_origins
from infer.ensemble.images.network_scores import describe_networks
from infer.ensemble.images.scores import image_probability
from infer.ensemble.lesions import describe_lesion_counts
from infer.ensemble.rows import (
    FitRows,
    find_folds,
    read_rows,
    refuse_unknown_blanks,
    warn_of_own_columns,
)
from infer.ensemble.scoring.calibration import (
    CALIBRATION,
    Calibration,
    fit_calibration,
    summarise_out_of_fold,
)
from infer.ensemble.scoring.chosen import CHOSEN_KEY, choice_notes, choices_of_lists
from infer.ensemble.scoring.few_lesions import format_by_lesions, pauc_by_lesions
from infer.ensemble.scoring.scores import format_scores, summarise
from infer.ensemble.scoring.triage import TRIAGE, summarise_triage
from infer.ensemble.settings import FitSettings
from isic import schema
from isic.dataset import Dataset, refuse_dataset
from isic.folds import Folds
from isic.layout import FOLDS_FILE, OOF_FILE
from isic.metadata import with_patient
from isic.runtime.files import sha256, versions, write_json
from isic.runtime.only_writer import only_writer
from isic.tables import write_parquet

MODEL_SETTINGS = {"seeds", "seed", "negatives", "image_noise", "blank_share"}
"""The settings that shape the model, without the fold plan and those of the libraries."""
ADDED_SETTINGS = {"blank", "thin_patients", "refit", "calibrate"}
"""More of them, which manifests lack if they have their defaults, as those of earlier fits do."""

# Computing features six times more takes about as long as a fit with three seeds.
MAX_ROWS_OF_FEW_TABLE = 50_000
"""Rows up to which the score by lesions per patient is computed without being asked for."""


def fit_ensemble(settings: FitSettings) -> Path:
    """Fit an ensemble, write it and print its out-of-fold scores. Return its folder."""
    rows = read_rows(settings)
    root = settings.output_dir / (settings.name or _default_name(rows.spec, rows.image))
    with only_writer(root):
        return _fit_into(root, rows, settings)


def _fit_into(root: Path, rows: FitRows, settings: FitSettings) -> Path:
    refuse_dataset(root, "--output_dir or --name")
    refuse_foreign_folder(root)
    # Compared before fitting, which takes minutes to hours.
    inputs = _manifest_inputs(rows)
    if not settings.force:
        refuse_other_ensemble(root, inputs)
    features = rows.table.features
    refuse_unknown_blanks(settings.blank, features.select(rows.names))
    _note_blank(features)
    warn_of_own_columns(rows.spec, features, rows.metadata)
    print(
        f"fitting {settings.features}: {len(rows.metadata):,} rows ({rows.target.sum():,} "
        f"malignant), {len(rows.names) or 1} features, {rows.folds.num_folds} folds, "
        f"{rows.num_boosters} boosters",
        flush=True,
    )
    result = fit_models(rows)
    refit = refit_boosters(rows) if settings.refit else None
    plans = fit_plans(rows, result.scores)
    oof = _out_of_fold(rows, result)
    measured = _measure(rows, result, oof, plans)
    calibration = _calibrate(rows, oof)
    training = _summarise_rows(rows)
    # Only now, so that a fit that fails leaves the earlier ensemble as it was.
    clear_ensemble(root)
    encoding = refit.encoding if refit else None
    state = EnsembleState(rows.names, result.encodings, rows.image, encoding)
    files = _write_files(root, result, state, rows.folds, oof, measured.summaries, training)
    files += write_plans(root, rows.metadata[schema.ID], plans)
    files += write_calibration(root, calibration)
    files += write_boosters(root, refit.boosters) if refit else []
    results = _manifest_results(result, rows.metadata, measured)
    results[CHOSEN_KEY] = choices_of_lists(
        rows.spec.words.lists, rows.metadata, inputs["metadata_sha256"]
    )
    if refit:
        results["refit"] = refit.manifest_field()
    write_ensemble_manifest(root, files, {**inputs, **results})
    measured.print()
    for note in choice_notes(root.name, results):
        print(note)
    if refit and refit.agreement:
        print(describe_agreement(refit.agreement))
    print(f"ensemble: {root}")
    return root


def fit_models(rows: FitRows) -> FitResult:
    """Fit the boosters; without any, the networks' scores are the result."""
    if not rows.names:
        return FitResult(scores={"image": image_probability(rows.images.by_column())})
    fold = rows.fold.to_numpy()
    return fit_boosters(rows.table, rows.names, rows.target, fold, rows.settings, rows.thinned)


def _out_of_fold(rows: FitRows, result: FitResult) -> pl.DataFrame:
    blended = blend(result.scores, rows.weights, result.scores)
    oof = rows.metadata.select(schema.ID, rows.fold, schema.TARGET)
    return oof.with_columns(**result.scores, blend=blended)


@dataclass(frozen=True)
class Measured:
    """The out-of-fold scores of an ensemble in numbers."""

    summaries: dict[str, dict[str, Any]]
    """By model, and of the blend."""
    networks: Mapping[str, Any]
    """Scores and correlations of the networks."""
    by_lesions: Mapping[str, float]
    """pAUC by the number of lesions scored together; empty if it was not computed."""

    def print(self) -> None:
        print(format_scores({**self.networks["scores"], **self.summaries}))
        if self.by_lesions:
            print(format_by_lesions(self.by_lesions))


def _measure(rows: FitRows, result: FitResult, oof: pl.DataFrame, plans: Plans) -> Measured:
    patient = with_patient(rows.metadata)[schema.PATIENT].to_numpy()
    summaries = _summarise_all(oof, patient)
    blended = oof["blend"].to_numpy()
    summaries["blend"] |= summarise_plans(plans, rows.target)
    summaries["blend"][TRIAGE] = summarise_triage(rows.target, blended, patient)
    if rows.settings.calibrate:
        summaries["blend"][CALIBRATION] = summarise_out_of_fold(
            rows.settings.calibrate, mean_of_models(result.scores), oof
        )
    by_lesions = {}
    few_table = rows.settings.few_table
    if few_table is None:
        few_table = len(oof) <= MAX_ROWS_OF_FEW_TABLE
    if rows.is_relative and few_table:
        by_lesions = pauc_by_lesions(
            result,
            rows.metadata,
            lambda part: rows.table_of(part).features,
            rows.fold,
            rows.weights,
            rows.settings.num_threads,
        )
    networks = describe_networks(rows.images.by_column(), oof, patient)
    return Measured(summaries, networks, by_lesions)


def _summarise_rows(rows: FitRows) -> Summary:
    own = rows.spec.own_by_set(rows.table.features)
    return {
        **summarise_table(rows.metadata, rows.spec.needed_columns),
        **summarise_own(own, rows.metadata, rows.spec.averaged),
    }


def _calibrate(rows: FitRows, oof: pl.DataFrame) -> Calibration | None:
    method = rows.settings.calibrate
    return fit_calibration(method, oof["blend"].to_numpy(), rows.target) if method else None


def model_settings(settings: FitSettings) -> dict[str, Any]:
    """Return the manifest's field on the settings that shape the boosters."""
    added = settings.model_dump(mode="json", include=ADDED_SETTINGS, exclude_defaults=True)
    return settings.model_dump(mode="json", include=MODEL_SETTINGS) | added


def own_inputs(spec: FeatureSpec, tables: Mapping[str, OwnTable]) -> dict[str, Any]:
    """Return the manifest fields of lists and own columns; texts, so that no file is needed."""
    fields = {"lists": dict(spec.words.lists), **spec.own.to_json()}
    for name, table in tables.items():
        fields["tables"][name]["sha256"] = sha256(table.path)
    return fields


def _note_blank(table: pl.DataFrame) -> None:
    blank = [column.name for column in table if column.null_count() == len(table)]
    if blank:
        print(f"note: {len(blank)} features are blank in every row, the first is {blank[0]}")


def _default_name(spec: FeatureSpec, image: ImageState) -> str:
    features = spec.words.label
    networks = "+".join(image.networks or image.frozen)
    return f"{features}_{networks}" if networks else features


def _summarise_all(oof: pl.DataFrame, patient: NDArray[np.str_]) -> dict[str, Any]:
    target = oof[schema.TARGET].to_numpy()
    fold = oof["fold"].to_numpy()
    models = oof.drop(schema.ID, schema.TARGET, "fold")
    return {column.name: summarise(target, column.to_numpy(), fold, patient) for column in models}


def _write_files(
    root: Path,
    result: FitResult,
    state: EnsembleState,
    folds: Folds,
    oof: pl.DataFrame,
    summaries: Mapping[str, Any],
    training: Summary,
) -> list[str]:
    """Write all files but the manifest. Return their names."""
    boosters = write_boosters(root, result.boosters)
    state_files = state.write(root)
    folds.write(root / FOLDS_FILE)
    write_parquet(root / OOF_FILE, oof)
    write_json(root / SCORES_FILE, summaries)
    write_json(root / TRAINING_FILE, summary_to_json(training))
    return [*boosters, *state_files, FOLDS_FILE, OOF_FILE, SCORES_FILE, TRAINING_FILE]


def _manifest_inputs(rows: FitRows) -> dict[str, Any]:
    """Return the manifest fields that determine an ensemble, known before it is fitted."""
    settings, weights, folds = rows.settings, rows.weights, rows.folds
    recorded = {**model_settings(settings), "num_folds": folds.num_folds}
    # Otherwise the plan comes from a file, whatever the seed is.
    if not find_folds(settings):
        recorded["split_seed"] = settings.seed_of_split
    # Left out otherwise, as in the manifests of versions that had one plan only.
    if settings.splits > 1:
        recorded["splits"] = settings.splits
    libraries = [library for library in weights if library in LIBRARIES]
    return {
        "features": settings.features,
        "weights": dict(weights),
        "parameters": {library: settings.parameters(library) for library in libraries},
        "folds_digest": folds.digest,
        **embedding_origins(rows.image, settings.sources, "train"),
        **own_inputs(rows.spec, rows.own_tables),
        "metadata_sha256": sha256(Dataset(settings.data).metadata_path("train")),
        "settings": recorded,
    }


def _manifest_results(
    result: FitResult, metadata: pl.DataFrame, measured: Measured
) -> dict[str, Any]:
    """Return the manifest fields that are known after fitting."""
    packages = dict.fromkeys(LIBRARIES[library].package for library, _, _ in result.boosters)
    return {
        "boosters": booster_entries(result.boosters),
        "lesions_per_patient": describe_lesion_counts(metadata),
        "scores": measured.summaries["blend"],
        "networks": measured.networks,
        "pauc_by_lesions": measured.by_lesions,
        "versions": versions("isic-toolkit", *packages, "numpy", "polars", "scikit-learn"),
    }
