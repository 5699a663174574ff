"""`python -m benchmarks accuracy`: out-of-fold scores of trained runs and ensembles beside simple baselines."""

from pathlib import Path
from typing import Any

import cv2
import lightgbm
import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from benchmarks.record import write
from infer.ensemble.artifact import open_ensemble
from isic import schema
from isic.dataset import Dataset
from isic.folds import draw_folds, fold_dirs
from isic.images import decode_pool
from isic.metrics import pauc, roc_auc
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.config import Settings
from isic.tables import read_parquet

PUBLISHED_OOF = {"tabular": "0.1689", "image": "0.1582", "both": "0.1738"}
"""pAUC out of fold on the challenge's whole training data, by what the models look at.

Source: https://github.com/junaidaliop/isic2024-tbp.
"""
PUBLISHED_BOARD = {
    "tabular": "0.162 to 0.165",
    "image": "0.140 to 0.142",
    "both": "0.169 to 0.173",
}
"""pAUC of published solutions on the challenge's private board, which is lower than out of fold."""
THUMBNAIL = 8
DECODED = 96


class AccuracySettings(Settings):
    """What `python -m benchmarks accuracy` takes."""

    data: Path = Field(description="dataset folder; its training rows are scored out of fold")
    label: str = Field(description="what the data is, in a few words, for the table")
    run: Path | None = Field(None, description="a trained run, outputs/<config>")
    ensembles: Path | None = Field(
        None, description="folder with fitted ensembles, outputs/ensemble"
    )
    baseline: bool = Field(
        True,
        description="also score LightGBM on colour statistics of the images, where there are any",
    )
    num_folds: int = Field(5, ge=2, description="folds of the baseline")
    split_seed: int = Field(42, description="seed of the baseline's folds")
    results: Path | None = Field(
        None, description="folder of the CSV; benchmarks/results if not given"
    )


def accuracy(settings: AccuracySettings) -> None:
    """Collects out-of-fold scores into a table: pooled, and by fold. Trains nothing but the colour baseline."""
    rows: list[dict[str, Any]] = []
    if settings.baseline and Dataset(settings.data).find_images("train"):
        rows.append(score("colour statistics, LightGBM", colour_baseline(settings), "image"))
    if settings.run:
        paths = [folder / "oof.parquet" for folder in fold_dirs(settings.run).values()]
        parts = [read_parquet(path) for path in paths if path.is_file()]
        rows.append(
            score(
                f"{settings.run.name}, images only",
                pl.concat(parts).rename({"logit": "score"}),
                "image",
            )
        )
    for path in sorted(settings.ensembles.glob("*/oof.parquet")) if settings.ensembles else []:
        oof = read_parquet(path).rename({"blend": "score"})
        rows.append(score(f"{path.parent.name}, ensemble", oof, sees(path.parent)))
    rows = [{**row, "data": settings.label} for row in rows]
    print(f"appended to {write('accuracy', rows, settings.results)}")


def sees(ensemble: Path) -> str:
    """Returns what an ensemble looks at, a key of PUBLISHED_OOF."""
    spec = open_ensemble(ensemble).spec
    if not spec.images:
        return "tabular"
    return "both" if spec.tabular else "image"


def score(name: str, oof: pl.DataFrame, kind: str) -> dict[str, Any]:
    """Returns a row of the table from `target`, `fold` and `score` of every row; `kind` is a key of PUBLISHED_OOF."""
    by_fold = [
        pauc(part["target"], part["score"]) for part in oof.sort("fold").partition_by("fold")
    ]
    return {
        "what": name,
        "rows": len(oof),
        "positives": int(oof["target"].sum()),
        "pauc_pooled": round(pauc(oof["target"], oof["score"]), 4),
        "pauc_mean_of_folds": round(float(np.mean(by_fold)), 4),
        "pauc_std_of_folds": round(float(np.std(by_fold, ddof=1)), 4) if len(by_fold) > 1 else None,
        "auc_pooled": round(roc_auc(oof["target"], oof["score"]), 4),
        "pauc_by_fold": " ".join(f"{value:.3f}" for value in by_fold),
        "published_oof": PUBLISHED_OOF[kind],
        "published_board": PUBLISHED_BOARD[kind],
    }


def colour_baseline(settings: AccuracySettings) -> pl.DataFrame:
    """Scores LightGBM on what an image's colours say, without learning to see. Returns isic_id, target, fold, score."""
    dataset = Dataset(settings.data)
    table = dataset.metadata("train")
    fold = draw_folds(table, settings.num_folds, settings.split_seed).of(table).to_numpy()
    features, target = (
        colour_statistics(dataset, table[schema.ID].to_list()),
        table[schema.TARGET].to_numpy(),
    )
    scores = np.zeros(len(table))
    for k in range(settings.num_folds):
        model = lightgbm.LGBMClassifier(
            n_estimators=200, learning_rate=0.05, num_leaves=15, random_state=0, verbose=-1
        )
        model.fit(features[fold != k], target[fold != k])
        scores[fold == k] = np.asarray(model.predict_proba(features[fold == k]))[:, 1]
    return table.select(schema.ID, schema.TARGET).with_columns(
        fold=pl.Series(fold), score=pl.Series(scores)
    )


def colour_statistics(dataset: Dataset, ids: list[str]) -> NDArray[np.float32]:
    """Returns an 8 x 8 Lab thumbnail, the mean and deviation of each channel, and the file's size: [N, 199]."""
    store = dataset.images("train")
    images: Pixels = np.empty((len(ids), DECODED, DECODED, 3), np.uint8)
    with decode_pool(1) as pool:
        store.decode(ids, PreprocessSpec(size=DECODED, interpolation="area"), images, pool)
    rows = []
    for image, size in zip(images, map(len, store.read(ids)), strict=True):
        lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
        thumbnail = cv2.resize(lab, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
        rows.append(np.concatenate([thumbnail.ravel(), lab.mean((0, 1)), lab.std((0, 1)), [size]]))
    return np.stack(rows).astype(np.float32)
