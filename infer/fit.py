"""Fits the ensemble: seeds x folds of boosters, each on its fold's training rows, and scores them out of fold."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field
from tqdm import tqdm

from infer import image_scores, scores
from infer.boosters import LIBRARIES
from infer.ensemble import OOF, SCORES, STATE, FeatureSpec, State, clear, write_manifest, write_table
from infer.image_scores import Standard
from isic import folds as fold_plans
from isic import schema
from isic.config import Settings
from isic.dataset import Dataset
from isic.errors import UserError
from isic.features import Encoding, fit_encoding, needed_columns
from isic.files import sha256, versions, write_json, write_text
from isic.folds import Folds, draw_folds, read_folds
from isic.metadata import require, with_patient

LIBRARY = "lightgbm"


class FitSettings(Settings):
    """Settings of `infer fit`."""

    data: Path = Field(Path("data/isic-2024"), description="dataset folder")
    features: str = Field(
        "engineered", description="raw, engineered, extended, image, multimodal, or a comma-separated list"
    )
    embeddings: Path | None = Field(None, description="outputs/embeddings/<config>, for image and multimodal")
    output_dir: Path = Field(Path("outputs/ensemble"), description="the ensemble lands in a folder of its own in it")
    name: str = Field("", description="that folder's name; by default the features and the embeddings' config")
    seeds: int = Field(3, ge=1, description="boosters a fold, each with its own draw of negatives")
    seed: int = Field(0, ge=0, description="the first of the seeds")
    num_folds: int = Field(5, ge=2, description="folds to draw where neither embeddings nor dataset bring a plan")
    split_seed: int = Field(42, ge=0, description="seed of that draw")
    num_rounds: int = Field(200, ge=1, description="boosting rounds")
    negatives: float = Field(100.0, gt=0, description="negatives kept for each positive")
    image_noise: float = Field(0.1, ge=0, description="deviation of the noise on training rows' image scores")
    num_threads: int = Field(0, ge=0, description="threads, 0 for all")


@dataclass(frozen=True)
class Bag:
    """Boosters and their out-of-fold scores."""

    boosters: dict[tuple[int, int], str]
    """By fold and seed, as text."""
    encodings: dict[int, Encoding]
    scores: NDArray[np.float64]
    """[num_seeds, N]."""


def fit(settings: FitSettings) -> None:
    """Fits a GBDT ensemble and writes it with its out-of-fold scores. The settings' fields are the flags."""
    spec = FeatureSpec.parse(settings.features)
    metadata = read_train(settings, spec)
    folds = plan_folds(settings, metadata)
    fold = folds.of(metadata).to_numpy()
    standard, image = _image(settings, spec, metadata, folds)
    table = spec.frame(metadata, image)
    _note_blank(table)
    if spec.names:
        bag = fit_bag(table, spec.names, metadata[schema.TARGET].to_numpy(), fold, settings)
        models = {f"{LIBRARY}_seed_{seed}": row for seed, row in zip(_seeds(settings), bag.scores, strict=True)}
    else:
        bag = Bag({}, {}, np.empty((0, len(table))))
        models = {"image": image_scores.probability(table)}
    models["blend"] = np.mean(list(models.values()), axis=0)
    root = settings.output_dir / (settings.name or _default_name(settings, spec))
    summaries = _summaries(metadata, fold, models)
    _write(root, settings, spec, folds, metadata, State(spec.names, bag.encodings, standard), bag, models, summaries)
    size = f"{len(spec.names) or 1} features, {len(metadata)} rows, {folds.num_folds} folds"
    print(f"{settings.features}: {size}, {len(bag.boosters)} boosters")
    print(scores.table(summaries))
    print(f"ensemble: {root}")


def read_train(settings: FitSettings, spec: FeatureSpec) -> pl.DataFrame:
    """Reads the training table in the order of its ids, so that the file's order changes nothing."""
    dataset = Dataset(settings.data)
    metadata = dataset.metadata("train").sort(schema.ID)
    require(metadata, needed_columns(spec.tabular), dataset.metadata_path("train"))
    return metadata


def plan_folds(settings: FitSettings, metadata: pl.DataFrame) -> Folds:
    """Returns the embeddings' fold plan, else the dataset's, else draws one. Raises UserError where it does not fit."""
    for root in (settings.embeddings, settings.data):
        path = root / fold_plans.FILE if root else None
        if path and path.is_file():
            return read_folds(path)
    return draw_folds(metadata, settings.num_folds, settings.split_seed)


def undersample(
    target: NDArray[np.integer], rows: NDArray[np.int64], negatives: float, seed: tuple[int, int]
) -> NDArray[np.int64]:
    """Returns the rows with every positive and at most `negatives` drawn negatives for each, sorted."""
    positive, negative = rows[target[rows] == 1], rows[target[rows] == 0]
    num_kept = int(len(positive) * negatives)
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
    """Fits one booster a fold and seed on the other folds' rows and scores the fold's own rows with it.

    Args:
        table: feature table of N rows.
        names: the columns to use.
        target, fold: [N].

    Raises:
        UserError: the rows outside a fold are of one class.
    """
    seeds = _seeds(settings)
    bag = Bag({}, {}, np.zeros((len(seeds), len(table))))
    tasks = [(k, seed) for k in np.unique(fold).tolist() for seed in seeds]
    for k in np.unique(fold).tolist():
        _need_both_classes(target[fold != k], k)
        bag.encodings[k] = fit_encoding(table.filter(pl.Series(fold != k)), names)

    def fit_one(task: tuple[int, int]) -> tuple[str, NDArray[np.float64]]:
        k, seed = task
        rows = undersample(target, np.flatnonzero(fold != k), settings.negatives, (seed, k))
        matrix = _with_noise(bag.encodings[k].transform(table[rows]), names, settings.image_noise, (seed, k))
        text = LIBRARIES[LIBRARY].fit(matrix, target[rows], names, settings.num_rounds, seed)
        held_out = bag.encodings[k].transform(table.filter(pl.Series(fold == k)))
        return text, LIBRARIES[LIBRARY].load(text)(held_out, 1)

    with ThreadPoolExecutor(settings.num_threads or available_cpus()) as pool:
        fitted = pool.map(fit_one, tasks)
        for (k, seed), (text, score) in zip(tasks, tqdm(fitted, "boosters", len(tasks), leave=False), strict=True):
            bag.boosters[k, seed] = text
            bag.scores[seed - seeds.start, fold == k] = score
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


def available_cpus() -> int:
    """The processors that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _seeds(settings: FitSettings) -> range:
    return range(settings.seed, settings.seed + settings.seeds)


def _need_both_classes(target: NDArray[np.integer], fold: int) -> None:
    if target.min() == target.max():
        raise UserError(f"the rows outside fold {fold} all have target {target[0]}; use fewer folds or more data")


def _image(
    settings: FitSettings, spec: FeatureSpec, metadata: pl.DataFrame, folds: Folds
) -> tuple[Standard | None, pl.DataFrame | None]:
    if not spec.image:
        return None, None
    if settings.embeddings is None:
        raise UserError(
            f"--features {settings.features} needs --embeddings outputs/embeddings/<config>; "
            "run `python -m infer embed` first"
        )
    logits = image_scores.oof_logits(settings.embeddings, metadata, folds)
    standard = image_scores.fit_standard(logits)
    return standard, image_scores.image_features(logits, standard, metadata)


def _note_blank(table: pl.DataFrame) -> None:
    blank = [column.name for column in table if column.null_count() == len(table)]
    if blank:
        print(f"note: {len(blank)} features are blank in every row and say nothing, the first is {blank[0]}")


def _default_name(settings: FitSettings, spec: FeatureSpec) -> str:
    name = "+".join(spec.words)
    return f"{name}_{settings.embeddings.name}" if spec.image and settings.embeddings else name


def _summaries(
    metadata: pl.DataFrame, fold: NDArray[np.integer], models: dict[str, NDArray[np.float64]]
) -> dict[str, Any]:
    target = metadata[schema.TARGET].to_numpy()
    patient = with_patient(metadata)[schema.PATIENT].to_numpy()
    return {name: scores.summarise(target, score, fold, patient) for name, score in models.items()}


def _write(
    root: Path,
    settings: FitSettings,
    spec: FeatureSpec,
    folds: Folds,
    metadata: pl.DataFrame,
    state: State,
    bag: Bag,
    models: dict[str, NDArray[np.float64]],
    summaries: dict[str, Any],
) -> None:
    clear(root)
    entries = []
    for (k, seed), text in bag.boosters.items():
        file = LIBRARIES[LIBRARY].file_name(LIBRARY, k, seed)
        write_text(root / file, text)
        entries.append({"file": file, "library": LIBRARY, "fold": k, "seed": seed})
    state.write(root / STATE)
    folds.write(root / fold_plans.FILE)
    oof = metadata.select(schema.ID, folds.of(metadata).alias("fold"), schema.TARGET)
    write_table(root / OOF, oof.with_columns(pl.Series(name, score) for name, score in models.items()))
    write_json(root / SCORES, summaries)
    fields = {
        "features": settings.features,
        "boosters": entries,
        "folds_digest": folds.digest,
        "embeddings": _embeddings_entry(settings, spec, folds),
        "metadata_sha256": sha256(Dataset(settings.data).metadata_path("train")),
        "settings": settings.model_dump(mode="json", include=MODEL_SETTINGS),
        "scores": summaries["blend"],
        "versions": versions("isic-toolkit", "lightgbm", "numpy", "polars", "scikit-learn"),
    }
    write_manifest(root, fields)


MODEL_SETTINGS = {"seeds", "seed", "num_rounds", "negatives", "image_noise", "num_folds", "split_seed"}
"""The settings that shape the model; where it was run and on how many threads do not."""


def _embeddings_entry(settings: FitSettings, spec: FeatureSpec, folds: Folds) -> dict[str, Any] | None:
    if not spec.image or settings.embeddings is None:
        return None
    run = image_scores.check_folds(settings.embeddings, "train", folds.digest)
    return {key: run.get(key) for key in ("config", "folds", "folds_digest", "engines")}
