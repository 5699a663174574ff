"""`infer fit --refit true` and `infer predict --rows all`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from infer.ensemble.artifact import open_ensemble
from infer.ensemble.blends.write import write_blend
from infer.ensemble.boosting.libraries import LIBRARIES
from infer.ensemble.boosting.refit import ESTIMATES, choose_rows, mean_scaler, measure_agreement
from infer.ensemble.boosting.training_table import TrainingTable
from infer.ensemble.images.scores import LogitScaler
from infer.ensemble.score_table import score_models
from infer.ensemble.settings import BlendSettings, EmbeddingSources
from isic import schema
from isic.dataset import Dataset
from isic.features import compute
from isic.folds import draw_folds, read_folds
from isic.layout import ALL, ALL_NUMBER
from isic.runtime.errors import UserError
from isic.runtime.files import read_json, write_json
from tests.support.commands import Cli
from tests.support.ensembles import (
    fit_settings,
    fit_small,
    predict_table,
    read_files,
    shuffle_targets,
    train_table,
    write_all_embeddings,
    write_embeddings,
    write_train,
)


@pytest.fixture(scope="module")
def refitted(tmp_path_factory: pytest.TempPathFactory, project: Path) -> Path:
    """A folder with `embeddings/tiny_all`, and ensembles that were refitted."""
    root = tmp_path_factory.mktemp("refit")
    data = project / "data"
    rng = np.random.default_rng(5)
    num_test = len(Dataset(data).metadata("test"))
    write_all_embeddings(root / "tiny_all", data, rng.standard_normal(num_test))
    shared: dict[str, Any] = {"refit": True, "num_rounds": 20}
    embeddings = project / "embeddings" / "tiny"
    fit_small(data, root, features="multimodal", embeddings=embeddings, seeds=2, **shared)
    fit_small(data, root, features="image", embeddings=embeddings, **shared)
    libraries = ("lightgbm", "xgboost")
    fit_small(data, root, features="raw", libraries=libraries, **shared)
    return root


def predict_all(project: Path, root: Path, ensemble: str, **more: object) -> pl.DataFrame:
    flags = {"ensemble": root / ensemble, "embeddings": root / "tiny_all", "rows": "all"}
    return predict_table(project, **(flags | more))


def test_a_booster_per_library_and_seed_is_added(project: Path, refitted: Path) -> None:
    root = refitted / "multimodal_tiny"
    manifest = read_json(root / "ensemble.json")
    entries = manifest["refit"]["boosters"]
    assert [(entry["fold"], entry["seed"]) for entry in entries] == [(ALL, 0), (ALL, 1)]
    assert all(entry["file"] in manifest["files"] for entry in entries)
    assert manifest["refit"]["out_of_fold_scores"] == ESTIMATES["all"]
    raw = read_json(refitted / "raw" / "ensemble.json")["refit"]["boosters"]
    assert [entry["library"] for entry in raw] == ["lightgbm", "xgboost"]
    image = read_json(refitted / "image_tiny" / "ensemble.json")["refit"]
    assert (image["boosters"], image["agreement"]) == ([], None)
    before = project / "ensemble" / "multimodal_tiny" / "ensemble.json"
    assert "refit" not in read_json(before)


def test_the_boosters_of_the_folds_stay_as_they_are(project: Path, tmp_path: Path) -> None:
    flags = {"features": "raw", "num_rounds": 20}
    without = read_files(fit_small(project / "data", tmp_path / "a", **flags))
    files = read_files(fit_small(project / "data", tmp_path / "b", refit=True, **flags))
    assert files.keys() - without.keys() == {"lightgbm_fold_all_seed_0.txt"}
    changed = {name for name, content in without.items() if files[name] != content}
    assert changed == {"ensemble.json", "state.json"}


def test_every_row_is_fitted_on(project: Path, refitted: Path) -> None:
    """Positives of every fold score above most negatives, as only rows of the fit would."""
    text = (refitted / "raw" / "lightgbm_fold_all_seed_0.txt").read_text()
    train = train_table(project / "data")
    encoding = open_ensemble(refitted / "raw").state.refit
    assert encoding is not None
    predict = LIBRARIES["lightgbm"].load(text)
    names = open_ensemble(refitted / "raw").state.names
    score = predict(encoding.transform(compute(train, names)), 1)
    positive = train[schema.TARGET].to_numpy() == 1
    fold = read_folds(refitted / "raw" / "folds.parquet").of(train).to_numpy()
    for k in range(3):
        rows = fold == k
        assert score[rows & positive].min() > np.median(score[rows & ~positive])


def test_scores_are_of_the_boosters_on_all_rows(project: Path, refitted: Path) -> None:
    folds = predict_all(project, refitted, "raw", rows="folds", embeddings=())
    everything = predict_all(project, refitted, "raw", embeddings=())
    assert not folds.equals(everything)
    ensemble = choose_rows(open_ensemble(refitted / "raw"), "all", EmbeddingSources())
    table = compute(Dataset(project / "data").metadata("test"), ensemble.state.names)
    models = score_models(ensemble, table, 1)
    assert list(models) == ["lightgbm_seed_0", "xgboost_seed_0"]
    encoding = ensemble.state.encodings[ALL_NUMBER]
    text = (refitted / "raw" / "xgboost_fold_all_seed_0.json").read_text()
    expected = LIBRARIES["xgboost"].load(text)(encoding.transform(table), 1)
    np.testing.assert_array_equal(models["xgboost_seed_0"], expected)
    manifest = json.loads((project / "submission.csv.json").read_text())
    assert manifest["rows"] == "all"
    assert manifest["out_of_fold_scores"] == ESTIMATES["all"]
    predict_all(project, refitted, "raw", rows="folds", embeddings=())
    manifest = json.loads((project / "submission.csv.json").read_text())
    assert manifest["rows"] == "folds"
    assert manifest["out_of_fold_scores"] == ESTIMATES["folds"]


def test_the_image_score_has_the_mean_of_the_folds_constants(project: Path, refitted: Path) -> None:
    submission = predict_all(project, refitted, "image_tiny")
    scaler = open_ensemble(refitted / "image_tiny").state.image.networks["tiny"].scaler
    assert scaler is not None
    mean = np.mean([mean for mean, _ in scaler.folds.values()])
    deviation = np.mean([deviation for _, deviation in scaler.folds.values()])
    shard = pl.read_parquet(refitted / "tiny_all" / "test" / "fold_all" / "part-00000.parquet")
    score = (shard["logit"].to_numpy().astype(float) - mean) / deviation
    np.testing.assert_allclose(submission["target"], 1 / (1 + np.exp(-score)), rtol=1e-5)
    manifest = json.loads((project / "submission.csv.json").read_text())
    assert manifest["embeddings"]["tiny"]["checkpoints"] == {ALL: "z"}
    scaler = LogitScaler({0: (1.0, 2.0), 1: (3.0, 6.0)})
    assert mean_scaler(scaler).folds == {ALL_NUMBER: (2.0, 4.0)}


def test_boosters_take_that_image_score(project: Path, refitted: Path, tmp_path: Path) -> None:
    first = predict_all(project, refitted, "multimodal_tiny")
    assert first["target"].is_between(0, 1).all()
    num_test = len(first)
    higher = np.random.default_rng(5).standard_normal(num_test) + np.arange(num_test)
    other = write_all_embeddings(tmp_path / "tiny_all", project / "data", higher)
    second = predict_all(project, refitted, "multimodal_tiny", embeddings=other)
    assert not first.equals(second)


def test_the_agreement_is_measured_on_rows_that_neither_has_seen(refitted: Path) -> None:
    agreement = read_json(refitted / "multimodal_tiny" / "ensemble.json")["refit"]["agreement"]
    assert agreement["num_fitted_rows"] + agreement["num_scored_rows"] == 400
    assert agreement["spearman"] > 0.8
    for key in ("pauc_folds", "pauc_all"):
        assert 0.1 < agreement[key] <= 0.2


def test_the_agreement_of_shuffled_targets_is_at_chance(data: Path, tmp_path: Path) -> None:
    """Boosters that had seen the rows that they score would be far above it."""
    paucs = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        table = shuffle_targets(data, folder, seed).sort(schema.ID)
        fold = draw_folds(table, 3, 42).of(table).to_numpy()
        names = tuple(compute(table, ("age_approx", "clin_size_long_diam_mm")).columns[1:])
        settings = fit_settings(folder, tmp_path)
        found = measure_agreement(
            TrainingTable(compute(table, names)), names, table, fold, settings
        )
        assert found is not None
        paucs += [found["pauc_folds"], found["pauc_all"]]
    assert np.mean(paucs) < 0.05


def test_the_agreement_is_printed(data: Path, tmp_path: Path, cli: Cli) -> None:
    flags = ["--features", "raw", "--seeds", 1, "--num_rounds", 5, "--num_folds", 3]
    where = ["--data", data, "--output_dir", tmp_path]
    ended = cli("infer", "fit", *where, *flags, "--refit", "true")
    assert ended.code == 0, ended.err
    assert "rows that neither was fitted on: pAUC 0." in ended.out
    assert "rank correlation 0." in ended.out
    other = cli("infer", "fit", *where, *flags)
    assert other.code == 2
    assert "settings.refit = True, now it is None" in other.err


def test_other_embeddings_than_the_rows_need_are_refused(project: Path, refitted: Path) -> None:
    by_folds = project / "embeddings" / "tiny"
    with pytest.raises(UserError, match=r"--rows all needs .*`python -m infer embed --config tiny"):
        predict_all(project, refitted, "multimodal_tiny", embeddings=by_folds)
    with pytest.raises(UserError, match="by the network of all rows; add --rows all"):
        predict_all(project, refitted, "multimodal_tiny", rows="folds")
    with pytest.raises(UserError, match="give --embeddings outputs/embeddings/tiny_all"):
        predict_all(project, refitted, "multimodal_tiny", embeddings=())
    with pytest.raises(UserError, match="has no boosters on all rows; fit it again with --refit"):
        predict_all(project, project / "ensemble", "multimodal_tiny")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("config", "other", "lacks tiny and also has other"),
        ("tta", "d4", "another --tta"),
        ("preprocess", {"size": 16}, "another preprocessing"),
        ("folds_digest", "x", "were made with the fold plan x"),
    ],
)
def test_a_network_of_another_recipe_is_refused(
    key: str, value: object, words: str, project: Path, refitted: Path, tmp_path: Path
) -> None:
    num_test = len(Dataset(project / "data").metadata("test"))
    root = write_all_embeddings(tmp_path / "tiny_all", project / "data", np.zeros(num_test))
    path = root / "test" / "run.json"
    write_json(path, read_json(path) | {key: value})
    with pytest.raises(UserError, match=words):
        predict_all(project, refitted, "image_tiny", embeddings=root)


def test_every_network_is_that_of_all_rows(project: Path, refitted: Path, tmp_path: Path) -> None:
    data = project / "data"
    other = write_embeddings(tmp_path / "other", data, seed=9)
    by_folds = (project / "embeddings" / "tiny", other)
    fit_small(data, tmp_path, features="raw,image", embeddings=by_folds, name="two", refit=True)
    num_test = len(Dataset(data).metadata("test"))
    logits = np.random.default_rng(8).standard_normal(num_test)
    other_all = write_all_embeddings(tmp_path / "other_all", data, logits, "other")
    tiny_all = refitted / "tiny_all"
    submission = predict_all(project, tmp_path, "two", embeddings=(other_all, tiny_all))
    manifest = json.loads((project / "submission.csv.json").read_text())
    assert {name: of["folds"] for name, of in manifest["embeddings"].items()} == {
        "other": [ALL],
        "tiny": [ALL],
    }
    again = predict_all(project, tmp_path, "two", embeddings=(tiny_all, other_all))
    assert again.equals(submission)
    with pytest.raises(UserError, match=r"other holds those by the folds; .*--config other"):
        predict_all(project, tmp_path, "two", embeddings=(tiny_all, other))


def test_aligned_columns_cannot_be_refitted(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--refit is not for aligned columns"):
        fit_small(data, tmp_path, features="raw,aligned", refit=True)


def test_a_blend_takes_the_boosters_of_each_member(
    project: Path, refitted: Path, tmp_path: Path, cli: Cli
) -> None:
    members = [refitted / "raw", refitted / "multimodal_tiny"]
    where = ["--output_dir", tmp_path, "--data", project / "data"]
    ended = cli("infer", "blend", *members, *where)
    assert ended.code == 0, ended.err
    predict_all(project, tmp_path, "blend", embeddings=refitted / "tiny_all")
    chosen = {"embeddings": (), "output": project / "one.csv"}
    one = predict_all(project, refitted, "raw", **chosen)["target"]
    models = pl.read_parquet(project / "submission_models.parquet")
    np.testing.assert_array_equal(models["raw"], one)


def test_a_blend_names_the_embeddings_of_all_members(
    project: Path, refitted: Path, tmp_path: Path
) -> None:
    data = project / "data"
    other = write_embeddings(tmp_path / "other", data, seed=9)
    second = fit_small(data, tmp_path, features="image", embeddings=other, refit=True)
    members = (refitted / "image_tiny", second)
    write_blend(BlendSettings(ensembles=members, output_dir=tmp_path, data=data))
    names = {
        "folds": "blend uses images; give --embeddings outputs/embeddings/other,.*/tiny$",
        "all": "blend uses images; give --embeddings outputs/embeddings/other_all,.*/tiny_all$",
    }
    for rows, message in names.items():
        with pytest.raises(UserError, match=message):
            predict_all(project, tmp_path, "blend", embeddings=(), rows=rows)


def test_a_first_fold_of_one_class_leaves_the_agreement_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = train_table(data)
    fold = draw_folds(table, 3, 42).of(table)
    one_class = table.with_columns(pl.when(fold == 0).then(0).otherwise("target").alias("target"))
    folder = write_train(tmp_path / "data", one_class)
    draw_folds(table, 3, 42).write(folder / "folds.parquet")
    root = fit_small(folder, tmp_path, features="raw", num_rounds=4, refit=True)
    assert "is not measured: all rows of fold 0 have target 0" in capsys.readouterr().out
    refit = read_json(root / "ensemble.json")["refit"]
    assert (len(refit["boosters"]), refit["agreement"]) == (1, None)
