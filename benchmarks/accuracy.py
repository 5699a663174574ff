"""`python -m benchmarks accuracy`: out-of-fold scores of runs, ensembles and a baseline."""

from pathlib import Path

import cv2
import lightgbm
import numpy as np
import polars as pl
from numpy.typing import NDArray

from benchmarks.record import Row, print_and_append
from benchmarks.settings import AccuracySettings
from infer.ensemble.blends.artifact import Blend, Scorer, open_scorer
from infer.ensemble.scoring.chosen import choices
from isic import schema
from isic.dataset import Dataset
from isic.folds import draw_folds
from isic.layout import CONFIG_FILE, OOF_FILE, fold_files
from isic.metrics import pauc, roc_auc
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.config import read_yaml
from isic.tables import read_parquet

PUBLISHED_OOF = {"tabular": "0.1689", "image": "0.1582", "both": "0.1738"}
"""Published out-of-fold pAUC on the challenge's whole training data, by the models' inputs.

Source: https://github.com/junaidaliop/isic2024-tbp.
"""
PUBLISHED_BOARD = {
    "tabular": "0.162 to 0.165",
    "image": "0.140 to 0.142",
    "both": "0.169 to 0.173",
}
"""pAUC of published solutions on the challenge's private board, lower than out of fold."""
CHOSEN_MARK = " (chosen on these rows)"
"""Marks a score that may be too high because its rows chose an epoch, features or weights."""
THUMBNAIL = 8
"""Side of the thumbnail whose pixels are features."""
DECODED = 96
"""Side of the images from which colour statistics are computed."""


def accuracy(settings: AccuracySettings) -> None:
    """Run `benchmarks accuracy`, which its settings describe."""
    rows: list[Row] = []
    # Some datasets have tables only.
    if settings.baseline and Dataset(settings.data).find_images("train"):
        oof = colour_baseline(settings.data, settings.num_folds, settings.split_seed)
        rows.append(score_row("colour statistics, LightGBM", oof, "image"))
    if settings.model_dir:
        oof = _read_run(settings.model_dir)
        name = f"{settings.model_dir.name}, images only{_mark_of_run(settings.model_dir)}"
        rows.append(score_row(name, oof, "image"))
    if settings.ensembles:
        for path in sorted(settings.ensembles.glob(f"*/{OOF_FILE}")):
            scorer = open_scorer(path.parent)
            oof = scorer.oof().rename({"blend": "score"})
            mark = CHOSEN_MARK if choices(scorer.manifest) else ""
            rows.append(score_row(f"{path.parent.name}, ensemble{mark}", oof, input_kind(scorer)))
    rows = [{**row, "data": settings.label} for row in rows]
    print(f"appended to {print_and_append('accuracy', rows, settings.results)}")


def _read_run(model_dir: Path) -> pl.DataFrame:
    folds = [read_parquet(path) for path in fold_files(model_dir, OOF_FILE).values()]
    return pl.concat(folds).rename({"logit": "score"})


def _mark_of_run(model_dir: Path) -> str:
    """Return CHOSEN_MARK if an epoch was selected on held-out rows, else nothing."""
    configs = fold_files(model_dir, CONFIG_FILE).values()
    selected = any(read_yaml(path).get("select_epoch") == "best" for path in configs)
    return CHOSEN_MARK if selected else ""


def input_kind(scorer: Scorer) -> str:
    """Return the kind of an ensemble's inputs, a key of PUBLISHED_OOF."""
    members = scorer.members.values() if isinstance(scorer, Blend) else [scorer]
    if not scorer.uses_images:
        return "tabular"
    return "both" if any(member.spec.table_names for member in members) else "image"


def score_row(name: str, oof: pl.DataFrame, kind: str) -> Row:
    """Return a row of the table from `target`, `fold` and `score` of every row."""
    folds = oof.sort("fold").partition_by("fold")
    by_fold = [pauc(fold["target"], fold["score"]) for fold in folds]
    spread = round(float(np.std(by_fold, ddof=1)), 4) if len(by_fold) > 1 else None
    return {
        "what": name,
        "rows": len(oof),
        "positives": int(oof["target"].sum()),
        "pauc_pooled": round(pauc(oof["target"], oof["score"]), 4),
        "pauc_mean_of_folds": round(float(np.mean(by_fold)), 4),
        "pauc_std_of_folds": spread,
        "auc_pooled": round(roc_auc(oof["target"], oof["score"]), 4),
        "pauc_by_fold": " ".join(f"{value:.3f}" for value in by_fold),
        "published_oof": PUBLISHED_OOF[kind],
        "published_board": PUBLISHED_BOARD[kind],
    }


def colour_baseline(data: Path, num_folds: int, split_seed: int) -> pl.DataFrame:
    """Return out-of-fold `isic_id`, `target`, `fold`, `score` of LightGBM on image colours."""
    dataset = Dataset(data)
    table = dataset.metadata("train")
    fold = draw_folds(table, num_folds, split_seed).of(table).to_numpy()
    features = colour_statistics(dataset, table[schema.ID].to_list())
    target = table[schema.TARGET].to_numpy()
    scores = np.zeros(len(table))
    for k in range(num_folds):
        held_out = fold == k
        model = lightgbm.LGBMClassifier(
            n_estimators=200, learning_rate=0.05, num_leaves=15, random_state=0, verbose=-1
        )
        model.fit(features[~held_out], target[~held_out])
        scores[held_out] = np.asarray(model.predict_proba(features[held_out]))[:, 1]
    return table.select(schema.ID, schema.TARGET).with_columns(
        fold=pl.Series(fold), score=pl.Series(scores)
    )


def colour_statistics(dataset: Dataset, ids: list[str]) -> NDArray[np.float32]:
    """Return the statistics of N images, [N, 199] float32."""
    store = dataset.images("train")
    images, _ = store.load(ids, PreprocessSpec(size=DECODED, interpolation="area"))
    files = store.read(ids)
    rows = [_statistics(image, len(file)) for image, file in zip(images, files, strict=True)]
    return np.stack(rows).astype(np.float32)


def _statistics(image: Pixels, num_bytes: int) -> NDArray[np.float64]:
    """Return a Lab thumbnail, mean and deviation per channel, and the file's size, [199]."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    thumbnail = cv2.resize(lab, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    mean = lab.mean(axis=(0, 1))
    deviation = lab.std(axis=(0, 1))
    return np.concatenate([thumbnail.ravel(), mean, deviation, [num_bytes]])
