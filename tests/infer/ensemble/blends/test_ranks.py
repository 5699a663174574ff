from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.ensemble.blends.ranks import blend, rank_among, rank_correlation, seeds_of
from infer.ensemble.boosting.libraries import LIBRARIES


def test_the_blend_is_the_weighted_mean_of_ranks(three_libraries: Path) -> None:
    oof = pl.read_parquet(three_libraries / "oof.parquet")
    ranks = {}
    for library in LIBRARIES:
        mean = (oof[f"{library}_seed_0"] + oof[f"{library}_seed_1"]) / 2
        ranks[library] = (mean.rank("average") - 0.5) / len(mean)
    expected = (2 * ranks["lightgbm"] + ranks["xgboost"] + ranks["catboost"]) / 4
    np.testing.assert_allclose(oof["blend"], expected, atol=1e-12)


def test_ranks_keep_the_order_also_outside_the_reference() -> None:
    reference = np.array([0.2, 0.4, 0.4, 0.6])
    score = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 1.0])
    ranks = rank_among(score, reference)
    assert (np.diff(ranks) > 0).all()
    assert ranks.min() > 0
    assert ranks.max() < 1
    assert ranks[[2, 4, 5]].tolist() == [0.125, 0.5, 0.875]


def test_a_single_library_keeps_its_probabilities() -> None:
    models = {"lightgbm_seed_3": np.array([0.1, 0.9]), "lightgbm_seed_4": np.array([0.3, 0.7])}
    assert blend(models, {"lightgbm": 5.0}, {}).tolist() == pytest.approx([0.2, 0.8])
    assert seeds_of([*models, "xgboost_seed_4"], ["lightgbm", "xgboost"]) == [4]


def test_a_constant_score_has_no_rank_correlation() -> None:
    score = np.array([0.1, 0.4, 0.2])
    assert rank_correlation(score, np.exp(score)) == pytest.approx(1)
    assert rank_correlation(score, np.ones(3)) is None
    assert rank_correlation(score[:1], score[:1]) is None
