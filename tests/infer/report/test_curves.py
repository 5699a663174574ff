import numpy as np
import pytest
from sklearn.decomposition import PCA

from infer.report.curves import Reliability, pca, reliability, wilson


def test_reliability_of_scores_that_are_probabilities() -> None:
    rng = np.random.default_rng(0)
    score = rng.beta(0.5, 20, 20_000)
    target = (rng.random(len(score)) < score).astype(np.int8)
    bins = reliability(target, score, np.arange(len(score)))
    assert len(bins.num_rows) == 10
    assert bins.num_rows.sum() == len(score)
    assert np.average(bins.observed, weights=bins.num_rows) == pytest.approx(target.mean())
    assert np.average(bins.mean_score, weights=bins.num_rows) == pytest.approx(score.mean())
    promised = bins.mean_score * bins.num_rows
    np.testing.assert_allclose(promised, promised.mean(), rtol=0.02)
    assert ((bins.low < bins.mean_score) & (bins.mean_score < bins.high)).sum() >= 8
    assert len(reliability(target, np.zeros(len(score)), target).num_rows) == 1


def share_inside(bins: Reliability) -> float:
    """Return the share of bins whose interval holds the mean score."""
    return float(np.mean((bins.low < bins.mean_score) & (bins.mean_score < bins.high)))


def test_calibration_bars_are_wider_when_lesions_of_a_patient_are_alike() -> None:
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(100), 20)
    score = np.repeat(rng.uniform(0, 1, 100), 20)
    target = np.repeat(rng.random(100) < score[::20], 20).astype(np.int8)
    by_patient = reliability(target, score, patient)
    by_lesion = reliability(target, score, np.arange(2000))
    assert share_inside(by_patient) >= 0.9
    assert share_inside(by_lesion) < 0.6
    low, high = wilson(by_patient.observed, by_patient.num_rows)
    assert (by_patient.low <= low).all()
    assert (by_patient.high >= high).all()


def test_wilson_intervals_are_the_textbooks() -> None:
    low, high = wilson(np.array([0.0, 0.5]), np.array([10, 10]))
    np.testing.assert_allclose(low, [0, 0.2366], atol=1e-4)
    np.testing.assert_allclose(high, [0.2775, 0.7634], atol=1e-4)


def test_principal_components_are_scikit_learns() -> None:
    features = np.random.default_rng(0).standard_normal((50, 6)) * [5, 3, 1, 1, 1, 1]
    ours, theirs = pca(features), PCA(2).fit(features)
    np.testing.assert_allclose(np.abs(ours.points), np.abs(theirs.transform(features)), atol=1e-9)
    assert ours.explained == pytest.approx(tuple(theirs.explained_variance_ratio_))
    for small in (features[:1], np.ones((4, 3)), features[:, :1]):
        assert pca(small).points.shape == (len(small), 2)
        assert np.isfinite(pca(small).points).all()
