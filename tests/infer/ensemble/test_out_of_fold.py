import json
from pathlib import Path

import numpy as np
import polars as pl

from infer.ensemble.fit import fit_ensemble
from infer.ensemble.out_of_fold import undersample
from isic.folds import draw_folds, read_folds
from isic.metrics import pauc
from tests.support.ensembles import (
    fit_settings,
    read_test_text,
    train_table,
    write_embeddings,
    write_train,
)


def test_out_of_fold_scores_are_one_a_model_and_their_mean(fitted: Path, data: Path) -> None:
    oof = pl.read_parquet(fitted / "oof.parquet")
    assert oof.columns == [
        "isic_id",
        "fold",
        "target",
        "lightgbm_seed_0",
        "lightgbm_seed_1",
        "blend",
    ]
    assert oof["isic_id"].to_list() == sorted(train_table(data)["isic_id"])
    np.testing.assert_allclose(oof["blend"], (oof["lightgbm_seed_0"] + oof["lightgbm_seed_1"]) / 2)
    assert oof["blend"].is_between(0, 1).all()
    assert oof["blend"].n_unique() > 100
    scores = json.loads((fitted / "scores.json").read_text())
    assert scores["blend"]["pauc"] == pauc(oof["target"], oof["blend"])
    assert len(scores["blend"]["pauc_by_fold"]) == 3
    assert set(scores) == set(oof.columns[3:])


def test_fold_members_of_held_out_rows_were_fitted_without_them(
    fitted: Path, data: Path, tmp_path: Path
) -> None:
    """Flips every label of fold 0's rows: the boosters of fold 0, and the scores of its rows, stay the same."""
    table = train_table(data)
    plan = read_folds(fitted / "folds.parquet")
    flipped = table.with_columns(
        pl.when(plan.of(table) == 0).then(1 - pl.col("target")).otherwise("target").alias("target")
    )
    root = write_train(tmp_path / "flipped", flipped)
    plan.write(root / "folds.parquet")
    fit_ensemble(fit_settings(root, tmp_path / "out", features="engineered"))
    again = tmp_path / "out" / "engineered"
    for k, equal in ((0, True), (1, False), (2, False)):
        name = f"lightgbm_fold_{k}_seed_0.txt"
        assert ((again / name).read_bytes() == (fitted / name).read_bytes()) == equal
    scores = [
        pl.read_parquet(root / "oof.parquet").filter(fold=0)["lightgbm_seed_0"]
        for root in (again, fitted)
    ]
    assert scores[0].equals(scores[1])


def test_shuffled_labels_give_chance(data: Path, embeddings: Path, tmp_path: Path) -> None:
    table = train_table(data)
    shuffled = table.with_columns(
        table["target"].sample(fraction=1, shuffle=True, seed=1).alias("target")
    )
    root = write_train(tmp_path / "shuffled", shuffled)
    plan = draw_folds(shuffled, 3, 42)
    test = read_test_text(data)
    test.write_csv(root / "test-metadata.csv")
    label_free = write_embeddings(tmp_path / "embeddings" / "blind", root, plan, strength=0.0)
    fit_ensemble(
        fit_settings(root, tmp_path / "out", features="multimodal", embeddings=label_free, seeds=2)
    )
    scores = json.loads((tmp_path / "out" / "multimodal_blind" / "scores.json").read_text())
    assert 0.38 < scores["blend"]["auc"] < 0.62


def test_negatives_are_drawn_only_where_there_are_more_than_wanted() -> None:
    target = np.array([1] * 3 + [0] * 50)
    rows = np.arange(1, 53)
    drawn = undersample(target, rows, 5, (0, 0))
    assert drawn[:2].tolist() == [1, 2]
    assert len(drawn) == 12
    assert len(set(drawn)) == 12
    assert drawn.max() < 53
    assert undersample(target, rows, 5, (0, 0)).tolist() == drawn.tolist()
    assert undersample(target, rows, 5, (1, 0)).tolist() != drawn.tolist()
    assert undersample(target, rows, 100, (0, 0)).tolist() == rows.tolist()
    assert (
        target[undersample(target, rows, 0.01, (0, 0))].sum()
        == 2
        < len(undersample(target, rows, 0.01, (0, 0)))
    )
