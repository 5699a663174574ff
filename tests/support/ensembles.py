"""Small datasets and synthetic embeddings for the tests of fitting and predicting."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from infer.embedding.outputs import EmbeddedImages, FoldOutputs
from infer.embedding.store import read_run, scan_embeddings, shard_path, write_shard
from infer.ensemble.fit import fit_ensemble
from infer.ensemble.predict import predict_submission
from infer.ensemble.settings import FitSettings, PredictSettings
from isic import schema
from isic.dataset import Dataset
from isic.folds import Folds, draw_folds
from isic.layout import ALL, TRAINED_ON_FILE, fold_dir
from isic.provenance import seen_rows, write_seen
from isic.runtime.files import read_json, write_json
from isic.synth.rows import draw_rows

NUM_FOLDS = 3
ENGINES = {"0": "a", "1": "b", "2": "c"}
"""Digests by fold."""


def write_dataset(
    root: Path, num_train: int = 400, num_positives: int = 60, num_test: int = 30
) -> Path:
    """Write a dataset of tables: 40 patients to train on, 6 others to score.

    The first test row is of an institution that no training row has.
    """
    rng = np.random.default_rng(3)
    root.mkdir(parents=True)
    train = draw_rows(
        [f"ISIC_1{i:06d}" for i in range(num_train)],
        [f"IP_1{i:06d}" for i in range(40)],
        num_positives,
        rng,
    )
    test = draw_rows(
        [f"ISIC_2{i:06d}" for i in range(num_test)], [f"IP_2{i:06d}" for i in range(6)], 3, rng
    )
    unseen = pl.Series("attribution", ["An institution never seen", *test.table["attribution"][1:]])
    train.table.write_csv(root / "train-metadata.csv")
    test.table.with_columns(unseen).drop(schema.TRAIN_ONLY).write_csv(root / "test-metadata.csv")
    return root


def train_table(data: Path) -> pl.DataFrame:
    return Dataset(data).metadata("train")


def read_test_text(data: Path) -> pl.DataFrame:
    """Read the test table with every column as text, so that it can be written back unchanged."""
    return pl.read_csv(data / "test-metadata.csv", infer_schema=False)


def write_train(root: Path, table: pl.DataFrame) -> Path:
    """Write a dataset that has only a training table."""
    root.mkdir()
    table.write_csv(root / "train-metadata.csv")
    return root


def write_embeddings(
    root: Path, data: Path, folds: Folds | None = None, seed: int = 0, strength: float = 2.0
) -> Path:
    """Write logits as of fold models that differ in scale; they know the label, with noise.

    Args:
        strength: weight of the label in the logits, compared with the noise's deviation of 1.
    """
    rng = np.random.default_rng(seed)
    train = train_table(data)
    test = Dataset(data).metadata("test")
    folds = folds or draw_folds(train, NUM_FOLDS, 42)
    fold = folds.of(train).to_numpy()
    folds.write(root / "folds.parquet")
    train_score = train[schema.TARGET].to_numpy() * strength + rng.standard_normal(len(train))
    test_score = rng.standard_normal(len(test))
    for k in range(folds.num_folds):
        held_out = np.flatnonzero(fold == k)
        _write_logits(
            shard_path(root, "train", k, 0), train[schema.ID][held_out], train_score[held_out], k
        )
        _write_logits(shard_path(root, "test", k, 0), test[schema.ID], test_score, k)
    for split in ("train", "test"):
        write_run(root, split, folds)
    write_seen_lists(root, train, folds)
    return root


def _write_logits(path: Path, ids: pl.Series, score: np.ndarray, fold: int) -> None:
    """Write a shard with the logits in the scale of a fold's model, and features of zeros."""
    logits = (score * (fold + 1) - 10 * fold).astype(np.float32)
    write_shard(path, ids.to_list(), np.zeros((len(logits), 4), np.float16), logits)


def write_seen_lists(root: Path, train: pl.DataFrame, folds: Folds) -> None:
    """Write, per fold's model, that it was trained on the rows of the other folds."""
    fold = folds.of(train)
    for k in range(folds.num_folds):
        write_seen(
            fold_dir(root / "train", k) / TRAINED_ON_FILE, seen_rows(train.filter(fold != k))
        )


def outputs_of(root: Path, ids: pl.Series) -> EmbeddedImages:
    """Return the test embeddings of a run as an embedder would."""
    run = read_run(root, "test")
    by_fold = {}
    for fold in run["folds"]:
        rows = scan_embeddings(root, "test", only_fold=fold).collect()
        rows = ids.to_frame("isic_id").join(rows, on="isic_id", maintain_order="left", how="left")
        features = rows["features"].to_numpy().astype(np.float32)
        by_fold[fold] = FoldOutputs(features, rows["logit"].to_numpy())
    return EmbeddedImages(by_fold, {}, run)


def write_run(root: Path, split: str, folds: Folds) -> None:
    """Write the `run.json` of a split."""
    run = {
        "config": root.name,
        "folds": list(range(folds.num_folds)),
        "folds_digest": folds.digest,
        "engines": ENGINES,
        "checkpoints": ENGINES,
        "tta": "none",
        "preprocess": {"size": 8},
    }
    write_json(root / split / "run.json", run)


def write_all_embeddings(root: Path, data: Path, logits: np.ndarray, config: str = "tiny") -> Path:
    """Write the test logits of the network of all rows of a config."""
    folds = draw_folds(train_table(data), 3, 42)
    ids = Dataset(data).metadata("test")["isic_id"].to_list()
    features = np.zeros((len(ids), 4), np.float16)
    write_shard(shard_path(root, "test", ALL, 0), ids, features, logits.astype(np.float32))
    write_run(root, "test", folds)
    path = root / "test" / "run.json"
    by_all = {"config": config, "folds": [ALL], "engines": {ALL: "z"}, "checkpoints": {ALL: "z"}}
    write_json(path, read_json(path) | by_all)
    return root


def fit_settings(data: Path, output_dir: Path, **more: object) -> FitSettings:
    """Return the settings of a fit that takes a second."""
    defaults = {"seeds": 1, "num_folds": NUM_FOLDS, "num_rounds": 40, "num_threads": 1}
    return FitSettings.model_validate(defaults | {"data": data, "output_dir": output_dir} | more)


def fit_small(data: Path, output_dir: Path, **more: object) -> Path:
    """Fit an ensemble in a second. Returns its folder."""
    return fit_ensemble(fit_settings(data, output_dir, **more))


def read_blend(ensemble: Path) -> dict[str, Any]:
    """Read the metrics of an ensemble's blend."""
    scores: dict[str, Any] = json.loads((ensemble / "scores.json").read_text())["blend"]
    return scores


def read_files(root: Path) -> dict[str, bytes]:
    """Read the files of a folder by name."""
    return {path.name: path.read_bytes() for path in root.iterdir()}


def shuffle_targets(data: Path, root: Path, seed: int = 1) -> pl.DataFrame:
    """Write the dataset with its targets in random order. Returns the training table."""
    table = train_table(data)
    target = table[schema.TARGET].sample(fraction=1, shuffle=True, seed=seed)
    shuffled = table.with_columns(target)
    write_train(root, shuffled)
    shutil.copy(data / "test-metadata.csv", root)
    return shuffled


def predict_table(project: Path, ensemble: str = "multimodal_tiny", **more: object) -> pl.DataFrame:
    """Predict with an ensemble of the fixture `project`. Returns the submission.

    The embeddings are left out if the ensemble was fitted without networks.
    """
    root = project / "ensemble" / ensemble
    manifest = root / "ensemble.json"
    without = manifest.is_file() and '"embeddings": {}' in manifest.read_text(errors="replace")
    defaults = {
        "data": project / "data",
        "ensemble": root,
        "embeddings": () if without else project / "embeddings" / "tiny",
        "output": project / "submission.csv",
    }
    settings = PredictSettings.model_validate(defaults | more)
    predict_submission(settings)
    return pl.read_csv(settings.output)


def predict_rows(project: Path, folder: Path, table: pl.DataFrame, **more: object) -> pl.Series:
    """Return the scores of another test table, which is written into a new folder."""
    folder.mkdir()
    table.write_csv(folder / "test-metadata.csv")
    return predict_table(project, data=folder, output=folder / "s.csv", **more)["target"]


def copy_tree(project: Path, tmp_path: Path, part: str) -> Path:
    """Copy a folder of the fixture `project`, to change it."""
    return Path(shutil.copytree(project / part, tmp_path / Path(part).name))
