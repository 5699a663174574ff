"""Fits the ensemble: libraries x seeds x folds of boosters, each on its fold's training rows, scored out of fold."""

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, field_validator, model_validator
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
from infer.report import write_report
from isic import folds as fold_plans
from isic import schema, yaml12
from isic.config import Settings, Several, build, find_config, read_yaml, yaml_reason
from isic.dataset import Dataset, refuse_dataset
from isic.errors import UserError, did_you_mean
from isic.features import Encoding, fit_encoding, needed_columns
from isic.files import sha256, versions, write_json, write_parquet, write_text
from isic.folds import Folds, draw_folds, read_folds
from isic.machine import num_cores
from isic.metadata import require, with_patient


def _mapping(value: Any) -> Any:
    """A flag is text: `--lightgbm "{max_depth: 5}"` is the YAML of a mapping."""
    try:
        return yaml12.load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise ValueError(f"this is not the YAML of a mapping ({yaml_reason(error)})") from None


Changes = Annotated[dict[str, bool | int | float | str], BeforeValidator(_mapping)]
"""Some of a library's settings: those in `infer.ensemble.boosters` with other values."""


BLANK_SHARE = 0.2
"""Share of the training rows in which a category is blanked, so that boosters have met a blank.

Chosen by `python -m benchmarks hospitals` on 885 real rows of four hospitals, with split seeds 7, 11
and 13. Its pAUC differs from that without blanks by 0.0000 (raw) and +0.0007 (engineered) on
hospitals held out, and by -0.0006 and 0.0000 in cross-validation; with split seed 42 and other
seeds, by +0.0011, -0.0006, +0.0010 and -0.0002: noise. 0.1 was no better. Leaving the hospital's
columns out instead gave +0.0004, -0.0022, -0.0007 and +0.0006: noise too, and it does not help the
other columns.
"""
NUM_FOLDS, SPLIT_SEED = 5, 42
"""The plan that is drawn when none comes with embeddings or dataset."""


class FitSettings(Settings):
    """Settings of `infer fit`."""

    config: str | None = Field(
        None,
        description="YAML file with any of these keys: a name in configs/ or a path; flags win over it",
    )
    data: Path = Field(Path("data/isic-2024"), description="dataset folder")
    features: str = Field(
        "engineered",
        description="raw, engineered, extended, image, multimodal, aligned, frozen, groups and features, "
        "with commas between them",
    )
    embeddings: Path | None = Field(
        None, description="outputs/embeddings/<config>, for all image words but frozen"
    )
    frozen: Path | None = Field(
        None, description="embeddings by a model trained on other images, for frozen"
    )
    output_dir: Path = Field(
        Path("outputs/ensemble"), description="the ensemble lands in a folder of its own in it"
    )
    name: str = Field(
        "", description="that folder's name; by default the features and the embeddings' config"
    )
    libraries: Several[str] = Field(("lightgbm",), description=f"some of {', '.join(LIBRARIES)}")
    weights: Several[float] = Field(
        (), description="a number a library, of their ranks; equal if not given"
    )
    lightgbm: Changes = Field({}, description='changed settings, such as "{max_depth: 5}"')
    xgboost: Changes = Field({}, description="the same")
    catboost: Changes = Field({}, description="the same")
    seeds: int = Field(
        3, ge=1, description="boosters a fold and library, each with its own draw of negatives"
    )
    seed: int = Field(0, ge=0, description="the first of the seeds")
    num_folds: int | None = Field(
        None,
        ge=2,
        description=f"folds to draw when no plan comes with embeddings or dataset, {NUM_FOLDS} if "
        "not given; another number than the plan's is refused",
    )
    split_seed: int | None = Field(
        None,
        ge=0,
        description=f"seed of that draw, {SPLIT_SEED} if not given; one that does not draw the plan "
        "is refused",
    )
    num_rounds: int | None = Field(
        None, ge=1, description="boosting rounds; each library's own if not given"
    )
    negatives: float = Field(
        100.0, gt=0, allow_inf_nan=False, description="negatives kept for each positive"
    )
    image_noise: float = Field(
        0.1,
        ge=0,
        allow_inf_nan=False,
        description="deviation of the noise on training rows' image scores",
    )
    blank_share: float = Field(
        BLANK_SHARE,
        ge=0,
        lt=1,
        description="share of the training rows in which a category is blanked, drawn per column",
    )
    num_threads: int = Field(0, ge=0, description="threads, 0 for all")
    force: bool = Field(
        False, description="replace an ensemble of that name that was fitted otherwise"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_file(cls, values: Any) -> Any:
        """Fills what is not given from the config file."""
        if not isinstance(values, Mapping) or not values.get("config"):
            return values
        path = find_config(values["config"])
        from_file = read_yaml(path)
        build(cls, from_file, str(path))  # by itself, so that an error names the file
        return {**from_file, **values}

    @field_validator("libraries")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in LIBRARIES:
                raise ValueError(f'unknown library "{name}", {did_you_mean(name, LIBRARIES)}')
        if not value or len(set(value)) < len(value):
            raise ValueError("name each library once")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "FitSettings":
        if self.weights and len(self.weights) != len(self.libraries):
            raise ValueError(
                f"--weights needs {len(self.libraries)} numbers, one for each of --libraries"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(
                "--weights must be numbers above 0; leave a library out of --libraries instead"
            )
        for name in LIBRARIES:
            parameters_of(name, getattr(self, name))
        return self

    def parameters(self, library: str) -> dict[str, Any]:
        """Returns a library's settings as they are used."""
        rounds = {"num_rounds": self.num_rounds} if self.num_rounds else {}
        return parameters_of(library, {**getattr(self, library), **rounds})

    @property
    def seed_of_split(self) -> int:
        return SPLIT_SEED if self.split_seed is None else self.split_seed

    @property
    def library_weights(self) -> dict[str, float]:
        return dict(zip(self.libraries, self.weights or (1.0,) * len(self.libraries), strict=True))

    @property
    def sources(self) -> Sources:
        return Sources(self.embeddings, self.frozen)


@dataclass(frozen=True)
class Bag:
    """Boosters, what their features were encoded with, and their out-of-fold scores."""

    boosters: dict[tuple[str, int, int], str]
    """By library, fold and seed, as text."""
    encodings: dict[int, Encoding]
    """By fold."""
    scores: dict[str, NDArray[np.float64]]
    """[N] by the model's name."""


def fit(settings: FitSettings) -> None:
    """Fits a GBDT ensemble and writes it with its out-of-fold scores. The settings' fields are the flags."""
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
    table = spec.frame(
        metadata, frames(image, settings.sources, "train", metadata, folds.digest, folds)
    )
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
    size = f"{len(names) or 1} features, {len(table)} rows, {folds.num_folds} folds, {len(bag.boosters)} boosters"
    print(f"{settings.features}: {size}\n{scores.table(summaries)}\nensemble: {root}")
    print(f"report: {write_report(root, settings.data, settings.embeddings)}")


def read_train(settings: FitSettings, spec: FeatureSpec) -> pl.DataFrame:
    """Reads the training table in the order of its ids, so that the file's order changes nothing."""
    dataset = Dataset(settings.data)
    metadata = dataset.metadata("train").sort(schema.ID)
    require(metadata, needed_columns(spec.tabular), dataset.metadata_path("train"))
    return metadata


def plan_folds(settings: FitSettings, metadata: pl.DataFrame) -> Folds:
    """Returns the embeddings' fold plan, else the dataset's, else draws one.

    Raises:
        UserError: the plan is not for these rows, or is not the one that the settings ask for.
    """
    path = _plan_path(settings)
    if path is None:
        return draw_folds(metadata, settings.num_folds or NUM_FOLDS, settings.seed_of_split)
    folds = read_folds(path)
    _refuse_contradiction(path, folds, metadata, settings.num_folds, settings.split_seed)
    return folds


def _plan_path(settings: FitSettings) -> Path | None:
    """Returns the fold plan of the embeddings, else the dataset's, None when a plan is to be drawn."""
    roots = (root for root in (settings.embeddings, settings.data) if root)
    paths = (root / fold_plans.FILE for root in roots)
    return next((path for path in paths if os.path.lexists(path)), None)


def _refuse_contradiction(
    path: Path,
    folds: Folds,
    metadata: pl.DataFrame,
    num_folds: int | None,
    split_seed: int | None,
) -> None:
    """Raises a UserError when settings that were given do not describe the plan that will be used."""
    if num_folds not in (None, folds.num_folds):
        raise UserError(
            f"{path} has {folds.num_folds} folds, not {num_folds}; leave --num_folds out"
        )
    if (
        split_seed is not None
        and draw_folds(metadata, folds.num_folds, split_seed).digest != folds.digest
    ):
        raise UserError(
            f"{path} is another fold plan than --split_seed {split_seed} draws; "
            "leave --split_seed out"
        )


def undersample(
    target: NDArray[np.integer], rows: NDArray[np.int64], negatives: float, seed: tuple[int, int]
) -> NDArray[np.int64]:
    """Returns the rows with every positive and at most `negatives` drawn negatives for each (one at least), sorted."""
    positive, negative = rows[target[rows] == 1], rows[target[rows] == 0]
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
    """Fits one booster a library, fold and seed on the other folds' rows and scores the fold's own rows with it.

    Args:
        table: feature table of N rows.
        names: the columns to use.
        target, fold: [N].

    Raises:
        UserError: the rows outside a fold are of one class.
    """
    seeds = range(settings.seed, settings.seed + settings.seeds)
    plan = np.unique(fold).tolist()
    tasks = [(library, k, seed) for library in settings.libraries for k in plan for seed in seeds]
    bag = Bag(
        {}, {}, {model_name(library, seed): np.zeros(len(table)) for library, _, seed in tasks}
    )
    for k in plan:
        _need_both_classes(target[fold != k], k)
        bag.encodings[k] = fit_encoding(table.filter(pl.Series(fold != k)), names)

    def fit_one(task: tuple[str, int, int]) -> tuple[str, NDArray[np.float64]]:
        library, k, seed = task
        rows = undersample(target, np.flatnonzero(fold != k), settings.negatives, (seed, k))
        matrix = _with_noise(
            bag.encodings[k].transform(table[rows]), names, settings.image_noise, (seed, k)
        )
        blanks = np.random.default_rng((seed, k, 2))
        bag.encodings[k].blank_categories(matrix, settings.blank_share, blanks)
        text = fit_booster(library, matrix, target[rows], names, settings.parameters(library), seed)
        held_out = bag.encodings[k].transform(table.filter(pl.Series(fold == k)))
        return text, LIBRARIES[library].load(text)(held_out, 1)

    pool = ThreadPoolExecutor(settings.num_threads or num_cores())
    try:
        fitted = tqdm(pool.map(fit_one, tasks), "boosters", len(tasks), leave=False, disable=None)
        for (library, k, seed), (text, score) in zip(tasks, fitted, strict=True):
            bag.boosters[library, k, seed] = text
            bag.scores[model_name(library, seed)][fold == k] = score
    finally:
        pool.shutdown(cancel_futures=True)  # where one fails, or at Ctrl-C, nobody wants the others
    return bag


def _with_noise(
    matrix: NDArray[np.float32], names: tuple[str, ...], deviation: float, seed: tuple[int, int]
) -> NDArray[np.float32]:
    """Adds one draw of noise a row to the image score and to what is relative to it.

    It keeps trees from trusting the exact value of a score that is a little different for rows to come.
    """
    columns = [names.index(name) for name in image_scores.FEATURES if name in names]
    if columns and deviation:
        noise = np.random.default_rng((*seed, 1)).normal(0, deviation, (len(matrix), 1))
        matrix[:, columns] += noise.astype(np.float32)
    return matrix


def _need_both_classes(target: NDArray[np.integer], fold: int) -> None:
    if target.min() == target.max():
        raise UserError(
            f"the rows outside fold {fold} all have target {target[0]}; use fewer folds or more data"
        )


def _note_blank(table: pl.DataFrame) -> None:
    blank = [column.name for column in table if column.null_count() == len(table)]
    if blank:
        print(
            f"note: {len(blank)} features are blank in every row and say nothing, the first is {blank[0]}"
        )


def _default_name(settings: FitSettings, spec: FeatureSpec) -> str:
    root = settings.embeddings or settings.frozen
    return "+".join(spec.words) + (f"_{root.name}" if spec.images and root else "")


def _summaries(patient: NDArray[np.str_], oof: pl.DataFrame) -> dict[str, Any]:
    target, fold = oof[schema.TARGET].to_numpy(), oof["fold"].to_numpy()
    models = oof.drop(schema.ID, schema.TARGET, "fold")
    return {
        column.name: scores.summarise(target, column.to_numpy(), fold, patient) for column in models
    }


def _write_files(
    root: Path, bag: Bag, state: State, folds: Folds, oof: pl.DataFrame, summaries: dict[str, Any]
) -> list[str]:
    """Writes all but the manifest and returns the names."""
    boosters = {file_name(*key): text for key, text in bag.boosters.items()}
    for name, text in boosters.items():
        write_text(root / name, text)
    state_files = state.write(root)
    folds.write(root / fold_plans.FILE)
    write_parquet(root / OOF, oof)
    write_json(root / SCORES, summaries)
    return [*boosters, *state_files, fold_plans.FILE, OOF, SCORES]


MODEL_SETTINGS = {"seeds", "seed", "negatives", "image_noise", "blank_share"}
"""The settings that shape the model, besides the fold plan."""


def _origin(
    settings: FitSettings, image: ImageState, folds: Folds, weights: Mapping[str, float]
) -> dict[str, Any]:
    """Returns what decides an ensemble: the fields of its manifest that are known before it is fitted."""
    return {
        "features": settings.features,
        "weights": dict(weights),
        "parameters": {
            library: settings.parameters(library) for library in weights if library in LIBRARIES
        },
        "folds_digest": folds.digest,
        **origins(image, settings.sources, "train", folds.digest),
        "metadata_sha256": sha256(Dataset(settings.data).metadata_path("train")),
        "settings": {
            **settings.model_dump(mode="json", include=MODEL_SETTINGS),
            "num_folds": folds.num_folds,
            **({} if _plan_path(settings) else {"split_seed": settings.seed_of_split}),
        },
    }


def _outcome(bag: Bag, metadata: pl.DataFrame, summaries: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that fitting adds."""
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
