"""Blending fitted ensembles: the files, the scores, the search for weights, and refusals."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.ensemble.blends.artifact import Blend, blend_by_fold, open_scorer, out_of_fold
from infer.ensemble.blends.ranks import rank_among, rank_correlation
from infer.ensemble.blends.write import choose_weights, search_weights, write_blend
from infer.ensemble.fitted import load_ensemble
from infer.ensemble.scoring.compare import compare_sides, pauc_by_seed
from infer.ensemble.settings import BlendSettings
from infer.submission.candidates import candidates_of
from infer.submission.networks import needs_of
from isic.metrics import pauc
from isic.runtime.errors import UserError
from isic.runtime.files import read_json, write_json
from tests.support.commands import Cli
from tests.support.ensembles import (
    fit_small,
    predict_rows,
    predict_table,
    read_test_text,
    write_embeddings,
)


def blend_of(project: Path, *names: str, **more: object) -> Path:
    """Blend ensembles of the fixture `project`. Returns the blend's folder."""
    defaults = {
        "ensembles": tuple(project / "ensemble" / name for name in names),
        "output_dir": project / "ensemble",
        "data": project / "data",
        "force": True,
    }
    return write_blend(BlendSettings.model_validate(defaults | more))


@pytest.fixture(scope="module")
def final(project: Path) -> Path:
    return blend_of(project, "raw", "multimodal_tiny", weights=(0.25, 0.75), name="final")


def test_the_out_of_fold_score_is_the_weighted_mean_of_ranks(project: Path, final: Path) -> None:
    oof = pl.read_parquet(final / "oof.parquet")
    expected = np.zeros(len(oof))
    for name, weight in {"raw": 0.25, "multimodal_tiny": 0.75}.items():
        member = pl.read_parquet(project / "ensemble" / name / "oof.parquet").sort("isic_id")
        assert oof[name].equals(member["blend"])
        expected += weight * ((member["blend"].rank("average") - 0.5) / len(member)).to_numpy()
    np.testing.assert_allclose(oof["blend"], expected, atol=1e-12)
    manifest = json.loads((final / "ensemble.json").read_text())
    assert manifest["weights"] == {"raw": 0.25, "multimodal_tiny": 0.75}
    assert json.loads((final / "scores.json").read_text())["blend"] == manifest["scores"]


def test_a_blend_scores_the_test_table_by_its_own_copies(
    project: Path, final: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(final, tmp_path / "moved"))
    submission = predict_table(project, ensemble=str(moved), output=tmp_path / "s.csv")
    models = pl.read_parquet(tmp_path / "s_models.parquet")
    expected = np.zeros(len(submission))
    for name, weight in {"raw": 0.25, "multimodal_tiny": 0.75}.items():
        alone = predict_table(project, ensemble=name, output=tmp_path / f"{name}.csv")
        assert models[name].to_list() == pytest.approx(alone["target"].to_list())
        reference = pl.read_parquet(final / "oof.parquet")[name].to_numpy()
        expected += weight * rank_among(alone["target"].to_numpy(), reference)
    np.testing.assert_allclose(submission["target"], expected, atol=1e-9)
    manifest = json.loads((tmp_path / "s.csv.json").read_text())
    assert manifest["weights"] == {"raw": 0.25, "multimodal_tiny": 0.75}


def test_an_unseen_category_is_named_once_for_all_members(
    project: Path, final: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict_table(project, ensemble=str(final), output=tmp_path / "s.csv")
    warned = capsys.readouterr().err
    assert warned.count("attribution has values that no training row has") == 1
    assert '"An institution never seen" (1 rows)' in warned


def test_a_rows_score_does_not_depend_on_the_other_patients(
    project: Path, final: Path, tmp_path: Path
) -> None:
    whole = predict_table(project, ensemble="final")
    table = read_test_text(project / "data")
    patient = table.filter(pl.col("patient_id") == table["patient_id"][0])
    alone = predict_rows(project, tmp_path / "one", patient, ensemble="final")
    expected = whole.filter(pl.col("isic_id").is_in(patient["isic_id"].implode()))["target"]
    np.testing.assert_allclose(alone, expected, atol=1e-12)


def test_members_without_a_weight_need_no_inputs(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, raw = project / "data", project / "ensemble" / "raw"
    embeddings = write_embeddings(tmp_path / "embeddings" / "misled", data, strength=-2.0)
    misled = fit_small(data, tmp_path, features="image", embeddings=embeddings, name="misled")
    root = blend_of(project, ensembles=(raw, misled), output_dir=tmp_path, weights="search")
    assert "note: only members without a weight use misled" in capsys.readouterr().out
    # The weights of a fold may be others.
    manifest = read_json(root / "ensemble.json")
    manifest["weights_by_fold"]["0"] = {"raw": 0.5, "misled": 0.5}
    write_json(root / "ensemble.json", manifest)

    lonely = read_test_text(data).head(1)
    few = predict_rows(project, tmp_path / "few", lonely, ensemble=str(root), embeddings=())
    assert "fewer than" not in capsys.readouterr().err
    alone = predict_rows(project, tmp_path / "alone", lonely, ensemble="raw", embeddings=())
    reference = pl.read_parquet(raw / "oof.parquet")["blend"].to_numpy()
    np.testing.assert_allclose(few, rank_among(alone.to_numpy(), reference))
    assert load_ensemble(root).embeddings == []
    blend = open_scorer(root)
    assert [candidate.networks for candidate in candidates_of(blend, "blend")] == [()]
    assert needs_of(blend, "folds") == []
    assert compare_sides([open_scorer(raw)], [blend], data, 100).draws.shape == (100, 2)


def test_scores_compare_and_report_take_a_blend(project: Path, final: Path, cli: Cli) -> None:
    flags = ["--data", project / "data"]
    ended = cli("infer", "compare", project / "ensemble" / "raw", final, *flags, "--draws", 100)
    assert ended.code == 0, ended.err
    assert "second against first: " in ended.out
    ended = cli("infer", "scores", "--output_dir", project / "ensemble")
    assert "final " in ended.out
    ended = cli("infer", "report", "--ensemble", final, *flags)
    assert ended.code == 0, ended.err
    page = (final / "report.html").read_text()
    assert re.search(r"raw 25\s%, multimodal_tiny 75\s%", page)
    assert "By member, pooled" in page


def test_the_seeds_of_a_blend_are_those_of_all_its_members(data: Path, tmp_path: Path) -> None:
    for name, features in (("a", "raw"), ("b", "numeric")):
        seeds = 2 if name == "a" else 3
        fit_small(data, tmp_path, features=features, name=name, seeds=seeds, num_rounds=8)
    paths = (tmp_path / "a", tmp_path / "b")
    root = write_blend(BlendSettings(ensembles=paths, output_dir=tmp_path, data=data))
    blend = open_scorer(root)
    assert isinstance(blend, Blend)
    assert blend.weights == {"a": 0.5, "b": 0.5}
    assert list(pauc_by_seed(blend)) == [0, 1]


def noisy_scores(target: np.ndarray, seed: int, noise: dict[str, float]) -> dict[str, np.ndarray]:
    """Return probabilities by member, the better the lower its noise."""
    random = np.random.default_rng(seed)
    logits = {
        name: 4 * target + of * random.standard_normal(len(target)) for name, of in noise.items()
    }
    return {name: 1 / (1 + np.exp(-logit)) for name, logit in logits.items()}


def test_the_search_finds_the_better_member() -> None:
    target = (np.random.default_rng(0).random(3000) < 0.1).astype(int)
    fold = np.arange(3000) % 3
    scores = noisy_scores(target, 1, {"good": 1.0, "useless": 100.0})
    weights, by_fold = choose_weights("search", scores, target, fold)
    assert weights["good"] > 0.8
    assert all(of_fold["good"] > 0.8 for of_fold in by_fold.values())


def test_searched_weights_are_kept_only_if_they_are_better_on_other_folds() -> None:
    target = (np.random.default_rng(0).random(600) < 0.1).astype(int)
    fold = np.arange(600) % 3
    equal = {"a": 0.5, "b": 0.5}
    kept = set()
    for seed in range(6):
        scores = noisy_scores(target, seed, {"a": 4.0, "b": 4.0})
        ranks = {name: rank_among(score, score) for name, score in scores.items()}
        nested = {k: search_weights(ranks, target, fold != k) for k in range(3)}
        is_better = pauc(target, blend_by_fold(scores, nested, fold)) > pauc(
            target, blend_by_fold(scores, dict.fromkeys(range(3), equal), fold)
        )
        _, by_fold = choose_weights("search", scores, target, fold)
        assert by_fold == (nested if is_better else dict.fromkeys(range(3), equal))
        kept.add(is_better)
    assert kept == {True, False}


def test_a_folds_weights_do_not_depend_on_its_own_labels() -> None:
    random = np.random.default_rng(1)
    target = (random.random(1200) < 0.2).astype(int)
    fold = np.arange(1200) % 3
    scores = {
        "a": 1 / (1 + np.exp(-(target + random.standard_normal(1200)))),
        "b": 1 / (1 + np.exp(-(target + random.standard_normal(1200)))),
    }
    ranks = {name: rank_among(score, score) for name, score in scores.items()}
    changed = np.where(fold == 0, 1 - target, target)
    before = search_weights(ranks, target, fold != 0)
    assert search_weights(ranks, changed, fold != 0) == before
    assert search_weights(ranks, changed, fold != 1) != search_weights(ranks, target, fold != 1)


def test_patients_with_few_lesions_are_scored_by_the_raw_member(
    project: Path, final: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = read_test_text(project / "data")
    lonely = table.head(1)
    others = table.filter(pl.col("patient_id") != lonely["patient_id"][0])
    mixed = pl.concat([lonely, others])
    usual = predict_rows(project, tmp_path / "warn", mixed, ensemble="final")
    raw = predict_rows(project, tmp_path / "raw", mixed, ensemble="final", few="raw")
    assert "rows of patients with few lesions are scored by raw features" in capsys.readouterr().out
    alone = predict_rows(project, tmp_path / "alone", mixed, ensemble="raw")
    oof = pl.read_parquet(final / "oof.parquet")
    rank = rank_among(alone.to_numpy(), oof["raw"].to_numpy())[0]
    assert rank_among(raw.to_numpy(), oof["blend"].to_numpy())[0] == pytest.approx(rank, abs=0.01)
    assert raw[0] != pytest.approx(usual[0])
    # The other patients keep their scores.
    counts = mixed["patient_id"].value_counts().sort("count")
    largest = counts["patient_id"][-1]
    same = (mixed["patient_id"] == largest).to_numpy()
    np.testing.assert_allclose(raw.to_numpy()[same], usual.to_numpy()[same])


@pytest.mark.parametrize(
    ("others", "weights", "atol"),
    [((), "equal", 0.01), (("image_tiny",), "equal", 0.02), (("image_tiny",), "search", 0.04)],
    ids=["one member", "two members", "weights per fold"],
)
def test_scores_of_few_lesions_are_spread_like_the_others(
    project: Path, others: tuple[str, ...], weights: str, atol: float
) -> None:
    """A mean of many ranks lies closer to the middle than one of few."""
    names = ("raw", *others, "engineered")
    blend = open_scorer(blend_of(project, *names, weights=weights, name="spread"))
    assert isinstance(blend, Blend)
    assert blend.single_lesion_members == ["raw", *others]
    members = blend.oof_models()
    assert 0.3 < rank_correlation(members["raw"], members["engineered"]) < 0.8
    found = blend.score_of_single_lesions(members)
    np.testing.assert_allclose(np.sort(found), np.sort(out_of_fold(blend)), atol=atol)


def test_raw_scoring_of_few_lesions_needs_a_raw_member(project: Path) -> None:
    with pytest.raises(UserError, match="--few raw needs a blend with an ensemble of features"):
        predict_table(project, few="raw")
    blend_of(project, "engineered", "multimodal_tiny", name="relative")
    with pytest.raises(UserError, match="--few raw needs a blend with an ensemble of features"):
        predict_table(project, ensemble="relative", few="raw")


def test_refusals(project: Path, final: Path, data: Path, tmp_path: Path, cli: Cli) -> None:
    ensembles = project / "ensemble"
    flags = ["--data", project / "data", "--output_dir", tmp_path]
    cases = {
        "is a blend; give the ensembles in": [final, ensembles / "raw"],
        "needs a name of its own": [ensembles / "raw", ensembles / "raw"],
        "--weights needs 2 numbers": [ensembles / "raw", ensembles / "engineered", "--weights=1"],
        "--weights must be numbers above 0": [
            ensembles / "raw",
            ensembles / "engineered",
            "--weights=1,0",
        ],
        "--weights is equal, search, or numbers": [
            ensembles / "raw",
            ensembles / "engineered",
            "--weights=best",
        ],
        "holds no finished ensemble": [ensembles / "raw", tmp_path / "none"],
    }
    for message, arguments in cases.items():
        ended = cli("infer", "blend", *arguments, *flags)
        assert ended.code == 2
        assert message in ended.err
    assert cli("infer", "blend", ensembles / "raw", *flags).code == 2
    assert not list(tmp_path.iterdir())
    other = fit_small(data, tmp_path / "other", features="raw", num_folds=4, num_rounds=4)
    ended = cli("infer", "blend", ensembles / "raw", ensembles / "engineered", other, *flags)
    assert ended.code == 2


def test_members_of_other_folds_are_refused(project: Path, tmp_path: Path) -> None:
    other = fit_small(
        project / "data", tmp_path, features="raw", num_folds=4, num_rounds=4, name="four"
    )
    with pytest.raises(UserError, match="were scored on different rows or folds"):
        write_blend(
            BlendSettings(
                ensembles=(project / "ensemble" / "raw", other),
                output_dir=tmp_path,
                data=project / "data",
            )
        )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tta", "flips", "another --tta of tiny"),
        ("checkpoints", {"0": "a", "1": "b", "2": "other"}, "other trained weights of tiny"),
        ("preprocess", {"size": 9}, "another preprocessing of tiny"),
    ],
)
def test_different_networks_of_one_name_are_refused(
    project: Path, tmp_path: Path, key: str, value: object, message: str
) -> None:
    """No embeddings could score such a blend."""
    other = tmp_path / "tiny"
    shutil.copytree(project / "embeddings" / "tiny", other)
    for split in ("train", "test"):
        run = other / split / "run.json"
        run.write_text(json.dumps(json.loads(run.read_text()) | {key: value}))
    fitted = fit_small(project / "data", tmp_path, features="image", embeddings=other, name="other")
    members = (project / "ensemble" / "image_tiny", fitted)
    with pytest.raises(UserError, match=message):
        blend_of(project, ensembles=members, output_dir=tmp_path, name="both")
    assert not (tmp_path / "both").exists()


def test_a_damaged_member_and_a_blend_of_that_name_are_refused(
    project: Path, final: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(final, tmp_path / "moved"))
    booster = next((moved / "members" / "raw").glob("*_seed_*"))
    booster.write_text(booster.read_text() + " ")
    with pytest.raises(UserError, match=r"does not match ensemble\.json"):
        open_scorer(moved)
    with pytest.raises(UserError, match="choose another --name, or replace it with --force"):
        blend_of(project, "raw", "multimodal_tiny", name="final", force=False)


def test_a_blend_does_not_replace_its_own_members(
    project: Path, final: Path, tmp_path: Path
) -> None:
    """--force clears the blend's folder before the members are copied into it."""
    Path(shutil.copytree(final, tmp_path / "final"))
    Path(shutil.copytree(project / "ensemble" / "raw", tmp_path / "raw"))
    inside = tmp_path / "final" / "members" / "multimodal_tiny"
    for name in ("raw", "final"):
        with pytest.raises(UserError, match="which is part of the blend; choose another --name"):
            blend_of(project, ensembles=(tmp_path / "raw", inside), output_dir=tmp_path, name=name)
    open_scorer(tmp_path / "final")
    open_scorer(tmp_path / "raw")


def test_a_member_may_have_the_name_of_a_field_of_the_manifest(
    project: Path, tmp_path: Path
) -> None:
    members = []
    for name in ("weights", "rows"):
        members.append(tmp_path / name)
        shutil.copytree(project / "ensemble" / "multimodal_tiny", members[-1])
    blend_of(project, ensembles=tuple(members), output_dir=tmp_path, name="final")
    predict_table(project, ensemble=str(tmp_path / "final"), output=tmp_path / "s.csv")
    manifest = json.loads((tmp_path / "s.csv.json").read_text())
    assert manifest["weights"] == {"weights": 0.5, "rows": 0.5}
    assert manifest["rows"] == "folds"
    assert {name: list(of["embeddings"]) for name, of in manifest["origins"].items()} == {
        "weights": ["tiny"],
        "rows": ["tiny"],
    }
