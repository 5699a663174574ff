"""Fit an ensemble and write it with its out-of-fold scores."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.ensemble.artifact import (
    SCORES_FILE,
    EnsembleState,
    clear_ensemble,
    refuse_foreign_folder,
    refuse_other_ensemble,
    write_ensemble_manifest,
)
from infer.ensemble.blend import blend
from infer.ensemble.booster_checks import check_library
from infer.ensemble.boosters import LIBRARIES, booster_file_name
from infer.ensemble.feature_spec import IMAGE_WORDS, FeatureSpec
from infer.ensemble.image_columns import ALIGNED
from infer.ensemble.image_features import (
    ImageState,
    embedding_origins,
    fit_image_state,
    read_image_rows,
)
from infer.ensemble.image_scores import image_probability
from infer.ensemble.lesions import describe_lesion_counts
from infer.ensemble.network_scores import describe_networks
from infer.ensemble.out_of_fold import FitResult, fit_boosters
from infer.ensemble.own_columns import OwnColumns, read_definitions, refuse_clashes
from infer.ensemble.own_tables import (
    LABEL_FREE,
    OwnTable,
    read_train_tables,
    refuse_other_folds,
    warn_of_labels,
)
from infer.ensemble.refit import describe_agreement, refit_boosters
from infer.ensemble.scores import format_scores, summarise
from infer.ensemble.settings import NUM_FOLDS, FitSettings
from infer.ensemble.splits import (
    fit_plans,
    refuse_splits,
    summarise_plans,
    write_plans,
)
from isic import schema
from isic.dataset import Dataset, refuse_dataset
from isic.features.definitions import check_definitions
from isic.folds import Folds, draw_folds, read_folds
from isic.layout import FOLDS_FILE, OOF_FILE
from isic.metadata import require, with_patient
from isic.runtime.errors import UserError
from isic.runtime.files import sha256, versions, write_json, write_text
from isic.tables import write_parquet

MODEL_SETTINGS = {"seeds", "seed", "negatives", "image_noise", "blank_share"}
"""The settings that shape the model, without the fold plan and those of the libraries."""


def fit_ensemble(settings: FitSettings) -> Path:
    """Fit an ensemble, write it and print its out-of-fold scores. Return its folder."""
    spec, own_tables = read_spec(settings)
    if settings.refit and ALIGNED in spec.forms:
        raise UserError(
            f"--refit is not for {ALIGNED} columns, which only the networks of the folds have; "
            f"leave out {ALIGNED} or --refit"
        )
    metadata = read_train(settings.data, spec)
    folds = choose_folds(settings, metadata)
    fold = folds.of(metadata)
    refuse_other_folds(own_tables.values(), metadata, fold.to_numpy(), folds)
    image = fit_image_state(spec.forms, settings.sources, metadata)
    refuse_splits(settings.splits, image.needs["embeddings"], _find_folds(settings))
    names = spec.names(image)
    for library in settings.libraries if names else ():
        check_library(library, settings.parameters(library), names)
    weights = settings.library_weights if names else {"image": 1.0}
    root = settings.output_dir / (settings.name or _default_name(spec, image))
    refuse_dataset(root, "--output_dir or --name")
    refuse_foreign_folder(root)
    # Compared before fitting, which takes minutes to hours.
    inputs = _manifest_inputs(settings, image, folds, weights)
    inputs |= own_inputs(spec, own_tables)
    if not settings.force:
        refuse_other_ensemble(root, inputs)
    images = read_image_rows(image, settings.sources, "train", metadata, out_of_fold=True)
    own_columns = [table.columns(metadata) for table in own_tables.values()]
    table = spec.frame(metadata, [*own_columns, *images.tables()])
    _note_blank(table)
    warn_of_own_columns(spec, table, metadata)
    boosters_per_plan = len(settings.libraries) * folds.num_folds * settings.seeds
    num_boosters = boosters_per_plan * settings.splits if names else 0
    print(
        f"fitting {settings.features}: {len(table):,} rows ({metadata[schema.TARGET].sum():,} "
        f"malignant), {len(names) or 1} features, {folds.num_folds} folds, "
        f"{num_boosters} boosters",
        flush=True,
    )
    if names:
        target = metadata[schema.TARGET].to_numpy()
        noisy = images.noisy(settings.image_noise)
        result = fit_boosters(table, names, target, fold.to_numpy(), settings, noisy)
    else:
        noisy = None
        result = FitResult(scores={"image": image_probability(images.by_column())})
    refit = None
    if settings.refit:
        refit = refit_boosters(table, names, metadata, fold.to_numpy(), settings, noisy)
    blended = blend(result.scores, weights, result.scores)
    oof = metadata.select(schema.ID, fold, schema.TARGET)
    oof = oof.with_columns(**result.scores, blend=blended)
    plans = fit_plans(table, names, metadata, settings, weights, fold.to_numpy(), result.scores)
    patient = with_patient(metadata)[schema.PATIENT].to_numpy()
    summaries = _summarise_all(oof, patient)
    summaries["blend"] |= summarise_plans(plans, metadata[schema.TARGET].to_numpy())
    networks = describe_networks(images.by_column(), oof, patient)
    # Only now, so that a fit that fails leaves the earlier ensemble as it was.
    clear_ensemble(root)
    state = EnsembleState(names, result.encodings, image, refit.encoding if refit else None)
    files = _write_files(root, result, state, folds, oof, summaries)
    files += write_plans(root, metadata[schema.ID], plans)
    results = _manifest_results(result, metadata, summaries)
    if refit:
        files += refit.write(root)
        results["refit"] = refit.manifest_field()
    write_ensemble_manifest(root, files, {**inputs, **results, "networks": networks})
    print(format_scores({**networks["scores"], **summaries}))
    if refit and refit.agreement:
        print(describe_agreement(refit.agreement))
    print(f"ensemble: {root}")
    return root


def read_spec(settings: FitSettings) -> tuple[FeatureSpec, dict[str, OwnTable]]:
    """Return the requested features, and the tables of own columns by set. Raise UserError."""
    tables = read_train_tables(settings.tables)
    specs = {name: table.spec for name, table in tables.items()}
    own = OwnColumns(read_definitions(settings.define), specs)
    refuse_clashes(own, IMAGE_WORDS)
    return FeatureSpec.parse(settings.features, own), tables


def own_inputs(spec: FeatureSpec, tables: Mapping[str, OwnTable]) -> dict[str, Any]:
    """Return the manifest fields of lists and own columns; texts, so that no file is needed."""
    fields = {"lists": dict(spec.words.lists), **spec.own.to_json()}
    for name, table in tables.items():
        fields["tables"][name]["sha256"] = sha256(table.path)
    return fields


def warn_of_own_columns(spec: FeatureSpec, table: pl.DataFrame, metadata: pl.DataFrame) -> None:
    """Warn of own columns that probably know the target. Scores out of fold may be that good."""
    target = metadata[schema.TARGET].to_numpy()
    for word, names in spec.own.sets.items():
        if word not in spec.own.tables or spec.own.tables[word].kind == LABEL_FREE:
            warn_of_labels(table, [name for name in names if name in spec.own_names], target, word)


def read_train(data: Path, spec: FeatureSpec) -> pl.DataFrame:
    """Read the training table, sorted by id so that the order of the file has no effect."""
    dataset = Dataset(data)
    metadata = dataset.metadata("train").sort(schema.ID)
    check_definitions(spec.own.all_definitions, metadata)
    require(metadata, spec.needed_columns, dataset.metadata_path("train"))
    return metadata


def choose_folds(settings: FitSettings, metadata: pl.DataFrame) -> Folds:
    """Return the fold plan of the embeddings, else of the dataset, else a new one.

    Raises:
        UserError: the plan is for other rows, or contradicts the settings.
    """
    path = _find_folds(settings)
    if path is None:
        return draw_folds(metadata, settings.num_folds or NUM_FOLDS, settings.seed_of_split)
    folds = read_folds(path)
    _refuse_contradiction(path, folds, metadata, settings.num_folds, settings.split_seed)
    return folds


def _find_folds(settings: FitSettings) -> Path | None:
    for root in (*settings.embeddings[:1], settings.data):
        # lexists: a broken link must be reported when it is read, not skipped.
        if os.path.lexists(root / FOLDS_FILE):
            return root / FOLDS_FILE
    return None


def _refuse_contradiction(
    path: Path,
    folds: Folds,
    metadata: pl.DataFrame,
    num_folds: int | None,
    split_seed: int | None,
) -> None:
    if num_folds not in (None, folds.num_folds):
        raise UserError(
            f"{path} has {folds.num_folds} folds, not {num_folds}; leave --num_folds out"
        )
    if split_seed is None:
        return
    if draw_folds(metadata, folds.num_folds, split_seed).digest != folds.digest:
        raise UserError(
            f"{path} is not the fold plan of --split_seed {split_seed}; leave --split_seed out"
        )


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
    summaries: dict[str, Any],
) -> list[str]:
    """Write all files but the manifest. Return their names."""
    boosters = {booster_file_name(*key): text for key, text in result.boosters.items()}
    for name, text in boosters.items():
        write_text(root / name, text)
    state_files = state.write(root)
    folds.write(root / FOLDS_FILE)
    write_parquet(root / OOF_FILE, oof)
    write_json(root / SCORES_FILE, summaries)
    return [*boosters, *state_files, FOLDS_FILE, OOF_FILE, SCORES_FILE]


def _manifest_inputs(
    settings: FitSettings, image: ImageState, folds: Folds, weights: Mapping[str, float]
) -> dict[str, Any]:
    """Return the manifest fields that determine an ensemble, known before it is fitted."""
    model_settings = settings.model_dump(mode="json", include=MODEL_SETTINGS)
    model_settings["num_folds"] = folds.num_folds
    if settings.refit:
        model_settings["refit"] = True
    # Otherwise the plan comes from a file, whatever the seed is.
    if not _find_folds(settings):
        model_settings["split_seed"] = settings.seed_of_split
    # Left out otherwise, as in the manifests of versions that had one plan only.
    if settings.splits > 1:
        model_settings["splits"] = settings.splits
    libraries = [library for library in weights if library in LIBRARIES]
    return {
        "features": settings.features,
        "weights": dict(weights),
        "parameters": {library: settings.parameters(library) for library in libraries},
        "folds_digest": folds.digest,
        **embedding_origins(image, settings.sources, "train"),
        "metadata_sha256": sha256(Dataset(settings.data).metadata_path("train")),
        "settings": model_settings,
    }


def _manifest_results(
    result: FitResult, metadata: pl.DataFrame, summaries: dict[str, Any]
) -> dict[str, Any]:
    """Return the manifest fields that are known after fitting."""
    boosters = [
        {
            "file": booster_file_name(library, k, seed),
            "library": library,
            "fold": k,
            "seed": seed,
        }
        for library, k, seed in result.boosters
    ]
    packages = dict.fromkeys(LIBRARIES[library].package for library, _, _ in result.boosters)
    return {
        "boosters": boosters,
        "lesions_per_patient": describe_lesion_counts(metadata),
        "scores": summaries["blend"],
        "versions": versions("isic-toolkit", *packages, "numpy", "polars", "scikit-learn"),
    }
