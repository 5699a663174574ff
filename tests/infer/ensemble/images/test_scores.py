import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.embedding.store import shard_path
from infer.ensemble.images.scores import fit_logit_scaler, mean_scores
from isic.folds import draw_folds
from isic.runtime.errors import UserError
from tests.support.ensembles import (
    fit_small,
    predict_table,
    train_table,
    write_embeddings,
    write_run,
)


def test_logits_are_standardised_per_fold() -> None:
    ids = [f"ISIC_{i}" for i in range(6)]
    logits = pl.DataFrame(
        {
            "isic_id": ids,
            "fold": pl.Series([0, 0, 0, 1, 1, 1], dtype=pl.Int8),
            "logit": [1.0, 2.0, 3.0, -20.0, -10.0, 0.0],
        }
    )
    scaler = fit_logit_scaler(logits)
    assert scaler.folds == {0: (2.0, 1.0), 1: (-10.0, 10.0)}
    metadata = pl.DataFrame({"isic_id": ids[::-1]})
    assert mean_scores(logits, scaler, metadata).to_list() == [1, 0, -1, 1, 0, -1]


def test_embeddings_that_lack_rows_are_refused(data: Path, tmp_path: Path) -> None:
    root = write_embeddings(tmp_path / "gaps", data)
    path = shard_path(root, "train", 1, 0)
    shard = pl.read_parquet(path)
    shard[3:].write_parquet(path)
    missing = sorted(shard["isic_id"][:3])
    message = f"lacks the train embeddings of 3 of 400 images, the first is {missing[0]} for fold 1"
    with pytest.raises(UserError, match=message):
        fit_small(data, tmp_path, features="multimodal", embeddings=root)
    skipped = pl.DataFrame({"isic_id": missing, "reason": ["truncated JPEG"] * 3})
    skipped.write_parquet(root / "train" / "errors.parquet")
    fit_small(data, tmp_path, features="multimodal", embeddings=root, num_rounds=2)
    fit_small(data, tmp_path, features="image", embeddings=root)


def test_embeddings_of_another_fold_plan_are_refused(data: Path, tmp_path: Path) -> None:
    root = write_embeddings(tmp_path / "other", data)
    write_run(root, "train", draw_folds(train_table(data), 3, 1))
    with pytest.raises(UserError, match="were made with the fold plan"):
        fit_small(data, tmp_path, features="image", embeddings=root)


def test_repeated_and_not_finite_logits_are_refused(data: Path, tmp_path: Path) -> None:
    root = write_embeddings(tmp_path / "nan", data)
    path = shard_path(root, "train", 0, 0)
    shard = pl.read_parquet(path)
    pl.concat([shard, shard[:1]]).write_parquet(path)
    with pytest.raises(UserError, match="has more than one train logit of fold 0"):
        fit_small(data, tmp_path, features="image", embeddings=root)
    shard.with_columns(pl.lit(float("nan"), dtype=pl.Float32).alias("logit")).write_parquet(path)
    with pytest.raises(UserError, match="train logits are not finite"):
        fit_small(data, tmp_path, features="image", embeddings=root)


def test_a_test_row_has_the_mean_over_the_fold_models(project: Path) -> None:
    """The image ensemble's score is the logistic function of the mean standardised logit."""
    state = json.loads((project / "ensemble" / "image_tiny" / "state.json").read_text())
    name = predict_table(project, "image_tiny")["isic_id"][0]
    standardised = []
    for k, (mean, std) in state["image"]["networks"]["tiny"]["scaler"].items():
        shard = pl.read_parquet(shard_path(project / "embeddings" / "tiny", "test", int(k), 0))
        standardised.append((shard.filter(isic_id=name)["logit"][0] - mean) / std)
    expected = 1 / (1 + np.exp(-np.mean(standardised)))
    assert predict_table(project, "image_tiny")["target"][0] == pytest.approx(expected, rel=1e-6)
