"""Fit an ensemble: a booster per library, fold and seed, each scored on its held-out rows."""

import itertools
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from pydantic.fields import FieldInfo
from tqdm import tqdm

from infer.ensemble import image_scores, scores
from infer.ensemble.artifact import (
    OOF,
    SCORES,
    FeatureSpec,
    State,
    clear,
    refuse_another,
    refuse_other_content,
    write_manifest,
)
from infer.ensemble.blend import blend, model_name
from infer.ensemble.boosters import LIBRARIES, file_name, fit_booster, parameters_of
from infer.ensemble.image_features import ImageState, Sources, frames, learn, origins
from infer.ensemble.lesions import describe
from isic import folds as fold_plans
from isic import schema
from isic.dataset import Dataset, refuse_dataset
from isic.features import Encoding, fit_encoding, needed_columns
from isic.folds import Folds, draw_folds, read_folds
from isic.metadata import require, with_patient
from isic.runtime import yaml12
from isic.runtime.config import Settings, Several, build, find_config, read_yaml, yaml_reason
from isic.runtime.errors import UserError, did_you_mean
from isic.runtime.files import sha256, versions, write_json, write_parquet, write_text
from isic.runtime.machine import num_cores

BLANK_SHARE = 0.2
"""Share of training rows in which a category is blanked, so that boosters learn to handle a blank.

Chosen by `python -m benchmarks hospitals` on 885 real rows of four hospitals. Change of the pAUC
compared with no blanks, for raw and engineered features (all noise by `infer compare`):

- split seeds 7, 11 and 13: 0.0000 and +0.0007 on held-out hospitals, -0.0006 and 0.0000 in
  cross-validation;
- split seed 42 and other seeds: +0.0011, -0.0006, +0.0010 and -0.0002.

A share of 0.1 was no better. Leaving the hospital's columns out gave +0.0004, -0.0022, -0.0007 and
+0.0006 (noise), and does not help the other columns.
"""
NUM_FOLDS = 5
SPLIT_SEED = 42
"""The fold plan if none comes with the embeddings or the dataset."""


class FitSettings(Settings):
    """Settings of `infer fit`."""

    config: str | None = Field(
        None,
        description="YAML file with any of these keys: a name in configs/ or a path; "
        "flags take precedence",
    )
    data: Path = Field(Path("data/isic-2024"), description="dataset folder")
    features: str = Field(
        "engineered",
        description="comma-separated sets (raw, engineered, extended, image, multimodal, aligned, "
        "frozen), groups and features",
    )
    embeddings: Path | None = Field(
        None, description="outputs/embeddings/<config>, for image, multimodal and aligned"
    )
    frozen: Path | None = Field(
        None, description="for frozen: embeddings by a model that was trained on other images"
    )
    output_dir: Path = Field(
        Path("outputs/ensemble"), description="parent of the ensemble's folder"
    )
    name: str = Field(
        "",
        description="name of the ensemble's folder; by default the features and the embeddings' "
        "config",
    )
    libraries: Several[str] = Field(("lightgbm",), description=f"some of {', '.join(LIBRARIES)}")
    weights: Several[float] = Field(
        (), description="one number per library, to weight its ranks; equal by default"
    )
    seeds: int = Field(
        3, ge=1, description="boosters per fold and library, each on its own sample of negatives"
    )
    seed: int = Field(0, ge=0, description="the first seed")
    num_folds: int | None = Field(
        None,
        ge=2,
        description=f"folds if neither embeddings nor dataset have a fold plan, {NUM_FOLDS} by "
        "default; must match the plan if there is one",
    )
    split_seed: int | None = Field(
        None,
        ge=0,
        description=f"seed of those folds, {SPLIT_SEED} by default; must match the plan if there "
        "is one",
    )
    num_rounds: int | None = Field(
        None, ge=1, description="boosting rounds; each library has its own default"
    )
    negatives: float = Field(
        100.0, gt=0, allow_inf_nan=False, description="sampled negatives per positive"
    )
    image_noise: float = Field(
        0.1,
        ge=0,
        allow_inf_nan=False,
        description="standard deviation of the noise on the image scores of training rows",
    )
    blank_share: float = Field(
        BLANK_SHARE,
        ge=0,
        lt=1,
        description="share of the training rows in which a category is blanked, per column",
    )
    num_threads: int = Field(0, ge=0, description="threads, 0 for all cores")
    force: bool = Field(
        False, description="replace an ensemble of that name that has other settings"
    )
    library_settings: dict[str, dict[str, Any]] = Field(
        {}, description="changed settings per library; the flags are the libraries' names"
    )

    @classmethod
    def flags(cls) -> dict[str, FieldInfo]:
        """Return the flags: one per library in place of `library_settings`."""
        others = {name: field for name, field in cls.model_fields.items() if name != CHANGES}
        help_text = 'changed settings of {}, such as "{{num_rounds: 100}}"'
        libraries = {
            name: FieldInfo(default={}, description=help_text.format(name)) for name in LIBRARIES
        }
        return {**others, **libraries}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: Any) -> Any:
        """Fill missing values from the config file, and gather the flags of the libraries."""
        if not isinstance(values, Mapping):
            return values
        if values.get("config"):
            path = find_config(values["config"])
            from_file = read_yaml(path)
            build(cls, from_file, str(path))  # on its own, so that an error names the file
            values = {**from_file, **values}
        others = {key: value for key, value in values.items() if key not in LIBRARIES}
        gathered = {key: _changes(key, values[key]) for key in LIBRARIES if key in values}
        if gathered and isinstance(others.setdefault(CHANGES, {}), Mapping):
            others[CHANGES] = {**others[CHANGES], **gathered}
        return others

    @field_validator("libraries")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            _need_library(name)
        if not value or len(set(value)) < len(value):
            raise ValueError("name each library once")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "FitSettings":
        if self.weights and len(self.weights) != len(self.libraries):
            raise ValueError(
                f"--weights needs {len(self.libraries)} numbers, one per entry of --libraries"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(
                "--weights must be numbers above 0; leave a library out of --libraries instead"
            )
        for name, changes in self.library_settings.items():
            _need_library(name)
            parameters_of(name, changes)
        return self

    def parameters(self, library: str) -> dict[str, Any]:
        """Return all settings of a library, the changed ones included."""
        changes = dict(self.library_settings.get(library, {}))
        if self.num_rounds:
            changes["num_rounds"] = self.num_rounds
        return parameters_of(library, changes)

    @property
    def seed_of_split(self) -> int:
        return SPLIT_SEED if self.split_seed is None else self.split_seed

    @property
    def library_weights(self) -> dict[str, float]:
        weights = self.weights or (1.0,) * len(self.libraries)
        return dict(zip(self.libraries, weights, strict=True))

    @property
    def sources(self) -> Sources:
        return Sources(self.embeddings, self.frozen)


CHANGES = "library_settings"


def _changes(library: str, value: Any) -> dict[str, Any]:
    """Return a library's changed settings, from a mapping or the YAML of one."""
    try:
        parsed = yaml12.load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise ValueError(
            f"--{library}: this is not the YAML of a mapping ({yaml_reason(error)})"
        ) from None
    if not isinstance(parsed, Mapping) or not all(isinstance(key, str) for key in parsed):
        example = '"{num_rounds: 100}"'
        raise ValueError(f"--{library} needs a mapping such as {example}, got {value!r}")
    return dict(parsed)


def _need_library(name: str) -> None:
    if name not in LIBRARIES:
        raise ValueError(f'unknown library "{name}", {did_you_mean(name, LIBRARIES)}')


@dataclass(frozen=True)
class Bag:
    """Fitted boosters, the encodings of their features, and their out-of-fold scores."""

    boosters: dict[tuple[str, int, int], str]
    """Text by library, fold and seed."""
    encodings: dict[int, Encoding]
    """By fold."""
    scores: dict[str, NDArray[np.float64]]
    """[N] by model name."""


def fit(settings: FitSettings) -> Path:
    """Fit an ensemble, writes it and prints its out-of-fold scores. Returns its folder."""
    spec = FeatureSpec.parse(settings.features)
    metadata = read_train(settings, spec)
    folds = plan_folds(settings, metadata)
    fold = folds.of(metadata)
    image = learn(spec.score, spec.forms, settings.sources, metadata, folds)
    names = spec.names(image)
    weights = settings.library_weights if names else {"image": 1.0}
    root = settings.output_dir / (settings.name or _default_name(settings, spec))
    refuse_dataset(root, "--output_dir or --name")
    refuse_other_content(root)
    origin = _origin(settings, image, folds, weights)
    if not settings.force:
        refuse_another(root, origin)
    image_tables = frames(image, settings.sources, "train", metadata, folds.digest, folds)
    table = spec.frame(metadata, image_tables)
    _note_blank(table)
    if names:
        bag = fit_bag(table, names, metadata[schema.TARGET].to_numpy(), fold.to_numpy(), settings)
    else:
        bag = Bag({}, {}, {"image": image_scores.probability(table)})
    blended = blend(bag.scores, weights, bag.scores)
    oof = metadata.select(schema.ID, fold, schema.TARGET).with_columns(**bag.scores, blend=blended)
    summaries = _summaries(with_patient(metadata)[schema.PATIENT].to_numpy(), oof)
    clear(root)
    files = _write_files(root, bag, State(names, bag.encodings, image), folds, oof, summaries)
    write_manifest(root, files, {**origin, **_outcome(bag, metadata, summaries)})
    print(
        f"{settings.features}: {len(names) or 1} features, {len(table)} rows, "
        f"{folds.num_folds} folds, {len(bag.boosters)} boosters"
    )
    print(scores.table(summaries))
    print(f"ensemble: {root}")
    return root


def read_train(settings: FitSettings, spec: FeatureSpec) -> pl.DataFrame:
    """Read the training table, sorted by id so that the order of the file has no effect."""
    dataset = Dataset(settings.data)
    metadata = dataset.metadata("train").sort(schema.ID)
    require(metadata, needed_columns(spec.tabular), dataset.metadata_path("train"))
    return metadata


def plan_folds(settings: FitSettings, metadata: pl.DataFrame) -> Folds:
    """Return the fold plan of the embeddings, else of the dataset, else a new one.

    Raises:
        UserError: the plan is for other rows, or contradicts the settings.
    """
    path = _plan_path(settings)
    if path is None:
        return draw_folds(metadata, settings.num_folds or NUM_FOLDS, settings.seed_of_split)
    folds = read_folds(path)
    _refuse_contradiction(path, folds, metadata, settings.num_folds, settings.split_seed)
    return folds


def _plan_path(settings: FitSettings) -> Path | None:
    """Return the file of the fold plan, None if there is none."""
    for root in (settings.embeddings, settings.data):
        if root and os.path.lexists(root / fold_plans.FILE):
            return root / fold_plans.FILE
    return None


def _refuse_contradiction(
    path: Path,
    folds: Folds,
    metadata: pl.DataFrame,
    num_folds: int | None,
    split_seed: int | None,
) -> None:
    """Raise a UserError if settings that were given do not match the fold plan."""
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


def undersample(
    target: NDArray[np.integer], rows: NDArray[np.int64], negatives: float, seed: tuple[int, int]
) -> NDArray[np.int64]:
    """Return all positive rows and a sample of the negative ones, sorted.

    Args:
        target: [N], 0 or 1.
        rows: the indices to choose from.
        negatives: kept per positive; at least one is kept in all.
    """
    positive = rows[target[rows] == 1]
    negative = rows[target[rows] == 0]
    num_kept = max(int(len(positive) * negatives), 1)
    if num_kept < len(negative):
        negative = np.random.default_rng(seed).choice(negative, num_kept, replace=False)
    return np.sort(np.concatenate([positive, negative]))


def fit_bag(
    table: pl.DataFrame,
    names: tuple[str, ...],
    target: NDArray[np.integer],
    fold: NDArray[np.integer],
    settings: FitSettings,
) -> Bag:
    """Fit a booster per library, fold and seed, and scores the fold's held-out rows with it.

    Args:
        table: feature table of N rows.
        names: the columns to use.
        target, fold: [N].

    Raises:
        UserError: the rows outside a fold are of one class.
    """
    seeds = range(settings.seed, settings.seed + settings.seeds)
    fold_ids = np.unique(fold).tolist()
    tasks = list(itertools.product(settings.libraries, fold_ids, seeds))
    bag = Bag({}, {}, {})
    for library, _, seed in tasks:
        bag.scores[model_name(library, seed)] = np.zeros(len(table))
    for k in fold_ids:
        _need_both_classes(target[fold != k], k)
        bag.encodings[k] = fit_encoding(table.filter(pl.Series(fold != k)), names)

    def fit_one(task: tuple[str, int, int]) -> tuple[str, NDArray[np.float64]]:
        library, k, seed = task
        encoding = bag.encodings[k]
        rows = undersample(target, np.flatnonzero(fold != k), settings.negatives, (seed, k))
        matrix = _with_noise(
            encoding.transform(table[rows]), names, settings.image_noise, (seed, k)
        )
        blanks = np.random.default_rng((seed, k, 2))
        encoding.blank_categories(matrix, settings.blank_share, blanks)
        text = fit_booster(library, matrix, target[rows], names, settings.parameters(library), seed)
        held_out = encoding.transform(table.filter(pl.Series(fold == k)))
        return text, LIBRARIES[library].load(text)(held_out, 1)

    pool = ThreadPoolExecutor(settings.num_threads or num_cores())
    try:
        fitted = tqdm(pool.map(fit_one, tasks), "boosters", len(tasks), leave=False, disable=None)
        for (library, k, seed), (text, score) in zip(tasks, fitted, strict=True):
            bag.boosters[library, k, seed] = text
            bag.scores[model_name(library, seed)][fold == k] = score
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C the rest is of no use
    return bag


def _with_noise(
    matrix: NDArray[np.float32], names: tuple[str, ...], deviation: float, seed: tuple[int, int]
) -> NDArray[np.float32]:
    """Add noise to the image score of each row, and the same noise to its relative score.

    New rows have slightly different scores, so the trees should not rely on exact values.
    """
    columns = [names.index(name) for name in image_scores.FEATURES if name in names]
    if columns and deviation:
        noise = np.random.default_rng((*seed, 1)).normal(0, deviation, (len(matrix), 1))
        matrix[:, columns] += noise.astype(np.float32)
    return matrix


def _need_both_classes(target: NDArray[np.integer], fold: int) -> None:
    if target.min() == target.max():
        raise UserError(
            f"the rows outside fold {fold} all have target {target[0]}; "
            "use fewer folds or more data"
        )


def _note_blank(table: pl.DataFrame) -> None:
    blank = [column.name for column in table if column.null_count() == len(table)]
    if blank:
        print(f"note: {len(blank)} features are blank in every row, the first is {blank[0]}")


def _default_name(settings: FitSettings, spec: FeatureSpec) -> str:
    root = settings.embeddings or settings.frozen
    features = "+".join(spec.words)
    return f"{features}_{root.name}" if spec.images and root else features


def _summaries(patient: NDArray[np.str_], oof: pl.DataFrame) -> dict[str, Any]:
    target = oof[schema.TARGET].to_numpy()
    fold = oof["fold"].to_numpy()
    models = oof.drop(schema.ID, schema.TARGET, "fold")
    return {
        column.name: scores.summarise(target, column.to_numpy(), fold, patient) for column in models
    }


def _write_files(
    root: Path, bag: Bag, state: State, folds: Folds, oof: pl.DataFrame, summaries: dict[str, Any]
) -> list[str]:
    """Write all files but the manifest and returns their names."""
    boosters = {file_name(*key): text for key, text in bag.boosters.items()}
    for name, text in boosters.items():
        write_text(root / name, text)
    state_files = state.write(root)
    folds.write(root / fold_plans.FILE)
    write_parquet(root / OOF, oof)
    write_json(root / SCORES, summaries)
    return [*boosters, *state_files, fold_plans.FILE, OOF, SCORES]


MODEL_SETTINGS = {"seeds", "seed", "negatives", "image_noise", "blank_share"}
"""The settings that shape the model, besides the fold plan and those of the libraries."""


def _origin(
    settings: FitSettings, image: ImageState, folds: Folds, weights: Mapping[str, float]
) -> dict[str, Any]:
    """Return the manifest fields that determine an ensemble, known before it is fitted."""
    model_settings = settings.model_dump(mode="json", include=MODEL_SETTINGS)
    model_settings["num_folds"] = folds.num_folds
    if not _plan_path(settings):
        model_settings["split_seed"] = settings.seed_of_split
    return {
        "features": settings.features,
        "weights": dict(weights),
        "parameters": {
            library: settings.parameters(library) for library in weights if library in LIBRARIES
        },
        "folds_digest": folds.digest,
        **origins(image, settings.sources, "train", folds.digest),
        "metadata_sha256": sha256(Dataset(settings.data).metadata_path("train")),
        "settings": model_settings,
    }


def _outcome(bag: Bag, metadata: pl.DataFrame, summaries: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest fields that are known after fitting."""
    packages = dict.fromkeys(LIBRARIES[library].package for library, _, _ in bag.boosters)
    return {
        "boosters": [
            {"file": file_name(library, k, seed), "library": library, "fold": k, "seed": seed}
            for library, k, seed in bag.boosters
        ],
        "lesions_per_patient": describe(metadata),
        "scores": summaries["blend"],
        "versions": versions("isic-toolkit", *packages, "numpy", "polars", "scikit-learn"),
    }
