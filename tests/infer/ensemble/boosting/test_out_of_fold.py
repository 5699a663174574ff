import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.ensemble.boosting.out_of_fold import undersample
from isic.folds import draw_folds, read_folds
from isic.metrics import pauc
from isic.runtime.errors import UserError
from tests.support.ensembles import (
    fit_small,
    read_blend,
    shuffle_targets,
    train_table,
    write_embeddings,
    write_train,
)


def test_every_model_has_out_of_fold_scores_and_the_blend_is_their_mean(
    fitted: Path, data: Path
) -> None:
    oof = pl.read_parquet(fitted / "oof.parquet")
    models = ["lightgbm_seed_0", "lightgbm_seed_1"]
    assert oof.columns == ["isic_id", "fold", "target", *models, "blend"]
    assert oof["isic_id"].to_list() == sorted(train_table(data)["isic_id"])
    np.testing.assert_allclose(oof["blend"], (oof["lightgbm_seed_0"] + oof["lightgbm_seed_1"]) / 2)
    assert oof["blend"].is_between(0, 1).all()
    assert oof["blend"].n_unique() > 100
    scores = json.loads((fitted / "scores.json").read_text())
    assert scores["blend"]["pauc"] == pauc(oof["target"], oof["blend"])
    assert len(scores["blend"]["pauc_by_fold"]) == 3
    assert set(scores) == set(oof.columns[3:])


def test_held_out_rows_do_not_influence_their_own_booster(
    fitted: Path, data: Path, tmp_path: Path
) -> None:
    """With the labels of fold 0 flipped, its boosters and the scores of its rows stay the same."""
    table = train_table(data)
    folds = read_folds(fitted / "folds.parquet")
    flipped = pl.when(folds.of(table) == 0).then(1 - pl.col("target")).otherwise("target")
    root = write_train(tmp_path / "flipped", table.with_columns(target=flipped))
    folds.write(root / "folds.parquet")
    again = fit_small(root, tmp_path / "out", features="engineered")
    names = [f"lightgbm_fold_{k}_seed_0.txt" for k in range(3)]
    equal = [(again / name).read_bytes() == (fitted / name).read_bytes() for name in names]
    assert equal == [True, False, False]
    scores = pl.read_parquet(again / "oof.parquet").filter(fold=0)["lightgbm_seed_0"]
    before = pl.read_parquet(fitted / "oof.parquet").filter(fold=0)["lightgbm_seed_0"]
    assert scores.equals(before)


def test_shuffled_targets_give_chance(data: Path, tmp_path: Path) -> None:
    shuffled = shuffle_targets(data, tmp_path / "shuffled")
    folds = draw_folds(shuffled, 3, 42)
    root = tmp_path / "shuffled"
    blind = write_embeddings(tmp_path / "embeddings" / "blind", root, folds, strength=0.0)
    chosen = {"features": "multimodal", "embeddings": blind, "seeds": 2}
    ensemble = fit_small(root, tmp_path / "out", **chosen)
    assert 0.38 < read_blend(ensemble)["auc"] < 0.62


def test_negatives_are_sampled_if_there_are_more_than_wanted() -> None:
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
    few = undersample(target, rows, 0.01, (0, 0))
    assert target[few].sum() == 2
    assert len(few) == 3, "at least one negative"


@pytest.mark.parametrize(
    ("features", "blank", "message"),
    [
        ("raw", "sex,atribution", 'no category "atribution" among the features, did you mean'),
        ("raw", "tbp_lv_A", "tbp_lv_A is a number; name categories only"),
        ("patient_z", "sex", 'no category "sex" among the features, there are none'),
    ],
)
def test_a_column_that_cannot_be_blanked_is_refused(
    data: Path, tmp_path: Path, features: str, blank: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fit_small(data, tmp_path, features=features, blank=blank)
    assert not (tmp_path / features).exists()


def test_only_the_named_categories_are_blanked(data: Path, tmp_path: Path) -> None:
    chosen = {"features": "attribution,tbp_tile_type", "num_rounds": 30, "blank_share": 0.5}
    roots = {
        blank: fit_small(data, tmp_path, name=blank or "all", blank=blank or (), **chosen)
        for blank in ("", "attribution", "attribution,tbp_tile_type", "tbp_tile_type,attribution")
    }
    boosters = {
        blank: (root / "lightgbm_fold_0_seed_0.txt").read_bytes() for blank, root in roots.items()
    }
    assert (
        boosters[""]
        == boosters["attribution,tbp_tile_type"]
        == boosters["tbp_tile_type,attribution"]
    )
    assert boosters[""] != boosters["attribution"]
    recorded = json.loads((roots["attribution"] / "ensemble.json").read_text())["settings"]
    assert recorded["blank"] == ["attribution"]
    # LightGBM writes each column's range of values in training.
    line = next(line for line in boosters["attribution"].decode().splitlines() if "infos" in line)
    tile, attribution = line.removeprefix("feature_infos=").split()
    assert attribution.startswith("[-1:")
    assert not tile.startswith("[-1:")
