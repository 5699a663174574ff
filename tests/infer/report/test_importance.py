import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from infer.ensemble.boosting.libraries import LIBRARIES
from infer.report.importance import importance, share_by_group


def test_gains_add_up_and_go_to_their_groups(fitted: Path) -> None:
    manifest, state = (
        json.loads((fitted / name).read_text()) for name in ("ensemble.json", "state.json")
    )
    table = importance(fitted, manifest["boosters"], state["names"])
    assert table["share"].sum() == pytest.approx(1)
    assert table["share"].is_sorted(descending=True)
    assert set(table["feature"]) == set(state["names"])
    groups = dict(share_by_group(table).select("group", "share").iter_rows())
    mine = table.filter(
        pl.col("feature").is_in(["image_score.tiny", "image_score_patient_diff.tiny"])
    )
    assert groups["image"] == pytest.approx(mine["share"].sum())
    assert groups["image"] > 0.2
    assert importance(fitted, [], []).is_empty()


def sampled_table() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((400, 5)).astype(np.float32)
    return matrix, (matrix[:, 2] + 0.5 * matrix[:, 4] + rng.standard_normal(400) > 0).astype(
        np.int64
    )


def test_gains_of_xgboost_are_its_own() -> None:
    xgboost = pytest.importorskip("xgboost")
    matrix, target = sampled_table()
    options = {"objective": "binary:logistic", "max_depth": 3, "nthread": 1}
    booster = xgboost.train(
        options, xgboost.DMatrix(matrix, target, feature_names=list("abcde")), 10
    )
    gains = LIBRARIES["xgboost"].gains(bytes(booster.save_raw("json")).decode(), 5)
    own = booster.get_score(importance_type="total_gain")
    np.testing.assert_allclose(gains, [own.get(name, 0) for name in "abcde"], rtol=1e-5)


def test_gains_of_catboost_are_its_own(tmp_path: Path) -> None:
    catboost = pytest.importorskip("catboost")
    matrix, target = sampled_table()
    options = {
        "iterations": 20,
        "depth": 4,
        "scale_pos_weight": 2.6,
        "loss_function": "Logloss",
        "thread_count": 1,
    }
    model = catboost.CatBoost({**options, "logging_level": "Silent", "allow_writing_files": False})
    model.fit(catboost.Pool(matrix, target))
    model.save_model(str(tmp_path / "model.json"), format="json")
    gains = LIBRARIES["catboost"].gains((tmp_path / "model.json").read_text(), 5)
    np.testing.assert_allclose(100 * gains / gains.sum(), model.get_feature_importance(), rtol=1e-5)
