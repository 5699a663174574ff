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
from infer.ensemble import OOF, STATE, FeatureSpec, State, clear, write_manifest
from infer.image_scores import Standard
from infer.report import write_report
from isic import folds as fold_plans
from isic import schema
from isic.config import Settings
from isic.dataset import Dataset
from isic.errors import UserError
from isic.features import Encoding, fit_encoding, needed_columns
from isic.files import sha256, versions, write_json, write_parquet, write_text
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
    """Boosters, what their features were encoded with, and their out-of-fold scores."""

    boosters: dict[tuple[int, int], str]
    """By fold and seed, as text."""
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
    standard, image = _image(settings, spec, metadata, folds)
    table = spec.frame(metadata, image)
    _note_blank(table)
    if spec.names:
        bag = fit_bag(table, spec.names, metadata[schema.TARGET].to_numpy(), fold.to_numpy(), settings)
    else:
        bag = Bag({}, {}, {"image": image_scores.probability(table)})
    bag.scores["blend"] = np.mean(list(bag.scores.values()), axis=0)
    oof = metadata.select(schema.ID, fold, schema.TARGET).with_columns(**bag.scores)
    summaries = _summaries(with_patient(metadata)[schema.PATIENT].to_numpy(), oof, bag)
    root = settings.output_dir / (settings.name or _default_name(settings, spec))
    clear(root)
    files = _write_files(root, bag, State(spec.names, bag.encodings, standard), folds, oof, summaries)
    write_manifest(root, files, _manifest(settings, spec, folds, bag, summaries))
    size = f"{len(spec.names) or 1} features, {len(table)} rows, {folds.num_folds} folds, {len(bag.boosters)} boosters"
    print(f"{settings.features}: {size}\n{scores.table(summaries)}\nensemble: {root}")
    print(f"report: {write_report(root, settings.data, settings.embeddings)}")


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
    seeds = range(settings.seed, settings.seed + settings.seeds)
    plan = np.unique(fold).tolist()
    bag = Bag({}, {}, {f"{LIBRARY}_seed_{seed}": np.zeros(len(table)) for seed in seeds})
    for k in plan:
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
        tasks = [(k, seed) for k in plan for seed in seeds]
        fitted = tqdm(pool.map(fit_one, tasks), "boosters", len(tasks), leave=False, disable=None)
        for (k, seed), (text, score) in zip(tasks, fitted, strict=True):
            bag.boosters[k, seed] = text
            bag.scores[f"{LIBRARY}_seed_{seed}"][fold == k] = score
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


def _summaries(patient: NDArray[np.str_], oof: pl.DataFrame, bag: Bag) -> dict[str, Any]:
    target, fold = oof[schema.TARGET].to_numpy(), oof["fold"].to_numpy()
    return {name: scores.summarise(target, score, fold, patient) for name, score in bag.scores.items()}


def _write_files(
    root: Path, bag: Bag, state: State, folds: Folds, oof: pl.DataFrame, summaries: dict[str, Any]
) -> list[str]:
    """Writes all but the manifest and returns the names."""
    boosters = {LIBRARIES[LIBRARY].file_name(LIBRARY, *key): text for key, text in bag.boosters.items()}
    for name, text in boosters.items():
        write_text(root / name, text)
    state.write(root / STATE)
    folds.write(root / fold_plans.FILE)
    write_parquet(root / OOF, oof)
    write_json(root / scores.FILE, summaries)
    return [*boosters, STATE, fold_plans.FILE, OOF, scores.FILE]


MODEL_SETTINGS = {"seeds", "seed", "num_rounds", "negatives", "image_noise", "num_folds", "split_seed"}
"""The settings that shape the model; where it was run and on how many threads do not."""


def _manifest(
    settings: FitSettings, spec: FeatureSpec, folds: Folds, bag: Bag, summaries: dict[str, Any]
) -> dict[str, Any]:
    embeddings = None
    if spec.image and settings.embeddings:
        embeddings = image_scores.made_with(settings.embeddings, "train", folds.digest)
    file_name = LIBRARIES[LIBRARY].file_name
    return {
        "features": settings.features,
        "boosters": [
            {"file": file_name(LIBRARY, k, seed), "library": LIBRARY, "fold": k, "seed": seed}
            for k, seed in bag.boosters
        ],
        "folds_digest": folds.digest,
        "embeddings": embeddings,
        "metadata_sha256": sha256(Dataset(settings.data).metadata_path("train")),
        "settings": settings.model_dump(mode="json", include=MODEL_SETTINGS),
        "scores": summaries["blend"],
        "versions": versions("isic-toolkit", "lightgbm", "numpy", "polars", "scikit-learn"),
    }
