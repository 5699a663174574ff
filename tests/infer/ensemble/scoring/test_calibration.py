"""Probabilities: that they are calibrated, keep the order, and leave the submission as it is."""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import polars as pl
import pytest
from scipy.special import expit

from infer.ensemble.artifact import open_ensemble
from infer.ensemble.blends.artifact import open_scorer
from infer.ensemble.blends.write import write_blend
from infer.ensemble.boosting.libraries import read_booster
from infer.ensemble.score_table import TableScores
from infer.ensemble.scoring.calibration import (
    CALIBRATION,
    Calibration,
    Method,
    calibration_error,
    fit_calibration,
    out_of_fold_probability,
    shift_prevalence,
)
from infer.ensemble.settings import BlendSettings
from infer.report.write import write_report
from isic.dataset import Dataset
from isic.runtime.errors import UserError
from tests.support.commands import Cli
from tests.support.ensembles import (
    fit_small,
    predict_rows,
    predict_table,
    read_blend,
    read_test_text,
)

METHODS = get_args(Method)


def draw(number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the scores of a model of too many positives, targets, and true probabilities."""
    random = np.random.default_rng(seed)
    odds = random.normal(-3, 1.5, number)
    target = (random.random(number) < expit(odds)).astype(int)
    return expit(odds + 2), target, expit(odds)


@pytest.mark.parametrize("method", METHODS)
def test_the_curve_finds_the_true_probabilities(method: Method) -> None:
    score, target, _ = draw(20_000)
    new_score, new_target, truth = draw(20_000, seed=1)
    probability = fit_calibration(method, score, target).probability(new_score)
    assert np.abs(new_score - truth).mean() > 0.15
    assert np.abs(probability - truth).mean() < 0.012
    assert calibration_error(probability, new_target) < 0.012


@pytest.mark.parametrize("method", METHODS)
def test_the_curve_never_falls_and_never_reaches_0_or_1(method: Method) -> None:
    score, target, _ = draw(300)
    curve = fit_calibration(method, score, target)
    again = Calibration.from_json(json.loads(json.dumps(curve.to_json())))
    probability = again.probability(np.linspace(0, 1, 5_000))
    assert (np.diff(probability) >= 0).all()
    assert 0 < probability.min() < probability.max() < 1


@pytest.mark.parametrize("method", METHODS)
def test_separated_and_inverted_scores_have_finite_probabilities(method: Method) -> None:
    target = np.repeat([0, 1], [90, 10])
    perfect = fit_calibration(method, np.linspace(0.01, 0.99, 100), target)
    assert perfect.probability(np.array([0.0, 1.0])) == pytest.approx([0, 1], abs=0.1)
    inverted = fit_calibration(method, np.linspace(0.99, 0.01, 100), target)
    assert np.ptp(inverted.probability(np.linspace(0, 1, 9))) == pytest.approx(0)
    assert inverted.probability(np.array([0.5]))[0] == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_a_folds_curve_does_not_know_its_labels(method: Method) -> None:
    score, target, _ = draw(400)
    fold = np.arange(400) % 4
    changed = np.where(fold == 2, 1 - target, target)
    first = out_of_fold_probability(method, score, target, fold)
    second = out_of_fold_probability(method, score, changed, fold)
    np.testing.assert_array_equal(first[fold == 2], second[fold == 2])
    assert not np.array_equal(first, second)


def test_the_prevalence_shifts_the_odds() -> None:
    """A sample with a tenth of the negatives, moved back to the share of all rows."""
    _, target, truth = draw(200_000)
    kept = (target == 1) | (np.arange(len(target)) % 10 == 0)
    in_sample = truth / (truth + (1 - truth) / 10)
    shifted = shift_prevalence(in_sample, float(target[kept].mean()), float(target.mean()))
    np.testing.assert_allclose(shifted, truth, rtol=0.03)


@pytest.fixture(scope="module")
def pair(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """Ensembles on two negatives per positive, calibrated and not."""
    root = tmp_path_factory.mktemp("calibration")
    return {
        method: fit_small(
            data, root, features="raw", negatives=2, seeds=2, name=str(method), calibrate=method
        )
        for method in (None, *METHODS)
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_calibrated_ensemble_corrects_the_sampling_of_negatives(
    pair: dict[str | None, Path], method: Method
) -> None:
    found = read_blend(pair[method])[CALIBRATION]
    assert found["method"] == method
    assert found["mean_before"] > 1.5 * found["malignant"]
    assert found["mean_after"] == pytest.approx(found["malignant"], rel=0.15)
    assert found["error_after"] < found["error_before"] / 2
    assert found["brier_after"] < found["brier_before"]


@pytest.mark.parametrize("method", METHODS)
def test_scores_ranks_and_the_submission_stay_the_same(
    pair: dict[str | None, Path], project: Path, tmp_path: Path, method: Method
) -> None:
    for name in (None, method):
        predict_table(
            project, ensemble=str(pair[name]), embeddings=(), output=tmp_path / f"{name}.csv"
        )
    assert (tmp_path / "None.csv").read_bytes() == (tmp_path / f"{method}.csv").read_bytes()
    plain = pl.read_parquet(tmp_path / "None_models.parquet")
    models = pl.read_parquet(tmp_path / f"{method}_models.parquet")
    assert models.drop("probability").equals(plain)
    probability = models.sort("blend")["probability"].to_numpy()
    assert (np.diff(probability) >= 0).all()
    if method == "platt":
        assert models["probability"].rank().equals(models["blend"].rank(), check_names=False)
    assert probability.mean() < 0.7 * models["blend"].to_numpy().mean()


def test_the_std_is_that_of_the_boosters(
    pair: dict[str | None, Path], project: Path, tmp_path: Path
) -> None:
    predict_table(project, ensemble=str(pair[None]), embeddings=(), output=tmp_path / "s.csv")
    models = pl.read_parquet(tmp_path / "s_models.parquet")
    ensemble = open_ensemble(pair[None])
    table = ensemble.spec.frame(Dataset(project / "data").metadata("test"), [])
    scores = [
        read_booster(ensemble.root / entry["file"], "lightgbm")(
            ensemble.state.encodings[entry["fold"]].transform(table), 1
        )
        for entry in ensemble.manifest["boosters"]
    ]
    assert len(scores) == 6
    np.testing.assert_allclose(models["std"], np.std(scores, axis=0, ddof=1), rtol=1e-9)
    np.testing.assert_allclose(models["blend"], np.mean(scores, axis=0), rtol=1e-9)


def test_several_libraries_and_blends(
    three_libraries: Path, pair: dict[str | None, Path], data: Path, project: Path, tmp_path: Path
) -> None:
    predict_table(project, ensemble=str(three_libraries), embeddings=(), output=tmp_path / "s.csv")
    std = pl.read_parquet(tmp_path / "s_models.parquet")["std"]
    assert std.is_between(0, 0.5, closed="none").all()
    settings = BlendSettings(
        ensembles=(pair["platt"], three_libraries),
        output_dir=tmp_path,
        data=data,
        calibrate="isotonic",
    )
    root = write_blend(settings)
    predict_table(project, ensemble=str(root), embeddings=(), output=tmp_path / "b.csv")
    models = pl.read_parquet(tmp_path / "b_models.parquet")
    assert (np.diff(models.sort("blend")["probability"]) >= 0).all()
    assert read_blend(root)[CALIBRATION]["method"] == "isotonic"
    with pytest.raises(UserError, match="calibrate"):
        write_blend(settings.model_copy(update={"calibrate": None}))


def test_the_report_shows_both(pair: dict[str | None, Path], data: Path) -> None:
    page = write_report(pair["platt"], data).read_text()
    brier = read_blend(pair["platt"])[CALIBRATION]["brier_after"]
    assert "Platt calibration: Brier score" in page
    assert f" to {brier:.4f}," in page
    assert page.count("<h3>After calibration</h3>") == 1
    assert "After calibration" not in write_report(pair[None], data).read_text()


def test_the_flags(pair: dict[str | None, Path], data: Path, tmp_path: Path, cli: Cli) -> None:
    def predict(name: str, prevalence: str) -> pl.Series:
        flags = ["--ensemble", pair["platt"], "--data", data, "--output", tmp_path / name]
        assert cli("infer", "predict", *flags, *prevalence.split()).code == 0
        return pl.read_parquet(tmp_path / f"{name[0]}_models.parquet")["probability"]

    rare = predict("r.csv", "--prevalence 0.001")
    usual = predict("u.csv", "")
    assert (rare < usual / 20).all()
    flags = ["--ensemble", pair[None], "--data", data, "--output", tmp_path / "no.csv"]
    ended = cli("infer", "predict", *flags, "--prevalence", 0.001)
    assert ended.code == 2
    assert "fit or blend it again with --calibrate" in ended.err
    assert not (tmp_path / "no.csv").exists()
    ended = cli("infer", "fit", "--calibrate", "spline")
    assert ended.code == 2
    printed = cli("infer", "scores", "--output_dir", pair[None].parent).out
    assert printed.count("calibration: Brier score") == 2


def test_a_later_fit_without_it_is_refused_and_removes_it_with_force(
    data: Path, tmp_path: Path
) -> None:
    shared = {"features": "numeric", "num_rounds": 2, "name": "it"}
    root = fit_small(data, tmp_path, calibrate="platt", **shared)
    assert (root / "calibration.json").exists()
    with pytest.raises(UserError, match="calibrate"):
        fit_small(data, tmp_path, **shared)
    fit_small(data, tmp_path, force=True, **shared)
    assert not (root / "calibration.json").exists()
    assert open_scorer(root).calibration is None


def test_rows_that_other_members_score_have_no_probability(project: Path, tmp_path: Path) -> None:
    members = tuple(project / "ensemble" / name for name in ("engineered", "raw"))
    settings = BlendSettings(
        ensembles=members, output_dir=tmp_path, data=project / "data", calibrate="platt"
    )
    given = {"ensemble": str(write_blend(settings)), "embeddings": (), "few": "raw"}
    table = read_test_text(project / "data")
    single = table.unique("patient_id", keep="first", maintain_order=True)
    single_ids = single["patient_id"][:2].implode()
    others = table.filter(~pl.col("patient_id").is_in(single_ids))
    mixed = pl.concat([single[:2], others])
    predict_rows(project, tmp_path / "mixed", mixed, **given)
    models = pl.read_parquet(tmp_path / "mixed" / "s_models.parquet")
    assert models["probability"].is_null().to_list()[:2] == [True, True]
    assert models["probability"].null_count() < len(models)


def test_rows_with_scores_of_another_ensemble_have_no_probability() -> None:
    score, rows = np.array([0.1, 0.2]), np.array([False, True])
    found = TableScores({}, score, {}, std=score, probability=score).replaced(rows, score + 0.5)
    np.testing.assert_allclose(found.score, [0.1, 0.7])
    for values in (found.std, found.probability):
        np.testing.assert_array_equal(values, [0.1, np.nan])
    assert TableScores({}, score, {}).replaced(rows, score).std is None
