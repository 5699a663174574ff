"""Predicting: the content of the submission, that nothing is fitted, and refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.embedding.store import shard_path
from infer.ensemble.blends.ranks import blend
from infer.ensemble.blends.write import write_blend
from infer.ensemble.boosting.libraries import LIBRARIES
from infer.ensemble.predict import predict_submission
from infer.ensemble.settings import BlendSettings, PredictSettings
from isic import schema
from isic.dataset import Dataset
from isic.folds import draw_folds
from isic.runtime.errors import UserError
from isic.runtime.files import sha256, write_json, write_manifest
from tests.support.commands import Cli
from tests.support.ensembles import (
    copy_tree,
    fit_small,
    predict_rows,
    predict_table,
    read_test_text,
    write_run,
    write_train,
)


@pytest.mark.parametrize("ensemble", ["engineered", "image_tiny", "multimodal_tiny"])
def test_every_row_has_a_score_in_the_tables_order(project: Path, ensemble: str) -> None:
    submission = predict_table(project, ensemble)
    assert submission.columns == ["isic_id", "target"]
    ids = Dataset(project / "data").metadata("test")["isic_id"]
    assert submission["isic_id"].to_list() == ids.to_list()
    assert submission["target"].is_between(0, 1).all()
    assert submission["target"].n_unique() > 10


def test_the_manifest_leads_back_to_the_ensemble_and_the_embeddings(project: Path) -> None:
    predict_table(project)
    manifest = json.loads((project / "submission.csv.json").read_text())
    assert manifest["sha256"] == sha256(project / "submission.csv")
    ensemble = project / "ensemble" / "multimodal_tiny" / "ensemble.json"
    assert manifest["ensemble"] == sha256(ensemble)
    assert manifest["embeddings"]["tiny"]["engines"] == {"0": "a", "1": "b", "2": "c"}


def test_the_sample_submission_gives_the_order(project: Path, tmp_path: Path) -> None:
    data = copy_tree(project, tmp_path, "data")
    before = predict_table(project)
    sample = before.sample(fraction=1, shuffle=True, seed=1).with_columns(target=pl.lit(0.3))
    sample.write_csv(data / "sample_submission.csv")
    submission = predict_table(project, data=data, output=tmp_path / "s.csv")
    assert submission["isic_id"].to_list() == sample["isic_id"].to_list()
    assert submission["isic_id"].to_list() != before["isic_id"].to_list()
    assert submission.sort("isic_id").equals(before.sort("isic_id"))


def test_a_sample_submission_of_other_ids_is_refused(project: Path, tmp_path: Path) -> None:
    data = copy_tree(project, tmp_path, "data")
    sample = predict_table(project)
    extra = pl.DataFrame({"isic_id": ["ISIC_9"], "target": [0.3]})
    for changed in (sample[1:], pl.concat([sample, extra])):
        changed.write_csv(data / "sample_submission.csv")
        with pytest.raises(UserError, match=r"1 of the 3. ids in .* are not in"):
            predict_table(project, data=data)


@pytest.mark.parametrize("text", ["", "id,target\n1,0\n", "isic_id,target\nISIC_1,0\nISIC_1,0\n"])
def test_a_broken_sample_submission_is_refused(project: Path, tmp_path: Path, text: str) -> None:
    data = copy_tree(project, tmp_path, "data")
    (data / "sample_submission.csv").write_text(text)
    with pytest.raises(UserError, match=r"sample_submission\.csv"):
        predict_table(project, data=data)


def test_scores_do_not_depend_on_the_other_patients_or_the_order(
    project: Path, tmp_path: Path
) -> None:
    everything = predict_table(project)
    table = read_test_text(project / "data")
    patient = table["patient_id"][4]
    data = tmp_path / "data"
    data.mkdir()
    some = table.filter(patient_id=patient).sample(fraction=1, shuffle=True, seed=2)
    some.write_csv(data / "test-metadata.csv")
    mine = predict_table(project, data=data, output=tmp_path / "s.csv")
    joined = mine.join(everything, on="isic_id")
    assert len(joined) == len(some)
    assert joined["target"].equals(joined["target_right"], check_names=False)


def test_a_single_row_with_an_unseen_institution_and_blanks(project: Path, tmp_path: Path) -> None:
    table = read_test_text(project / "data")
    (tmp_path / "data").mkdir()
    one = table[:1].with_columns(pl.lit(None).alias("age_approx"), pl.lit("").alias("sex"))
    assert one["attribution"][0] == "An institution never seen"
    one.write_csv(tmp_path / "data" / "test-metadata.csv")
    submission = predict_table(project, data=tmp_path / "data", output=tmp_path / "s.csv")
    assert len(submission) == 1
    assert 0 <= submission["target"][0] <= 1


@pytest.mark.parametrize("column", schema.CATEGORICAL)
def test_an_unseen_category_is_scored_as_a_blank(
    project: Path, tmp_path: Path, column: str
) -> None:
    """The column is the only feature, so nothing else can hide the difference."""
    rng = np.random.default_rng(0)
    size = 600
    ids = [f"ISIC_{i:07d}" for i in range(size)]
    values = rng.choice(["a", "b"], size, p=[0.7, 0.3])
    target = rng.random(size) < np.where(values == "a", 0.6, 0.1)
    table = pl.DataFrame({"isic_id": ids, "target": target.astype(int), column: values})
    ensemble = fit_small(write_train(tmp_path / "train", table), tmp_path, features=column)
    test = pl.DataFrame(
        {"isic_id": [f"ISIC_9{i}" for i in range(4)], column: ["a", "b", "never seen", None]}
    )
    chosen = {"ensemble": ensemble, "embeddings": ()}
    common, rare, unseen, blank = predict_rows(project, tmp_path / "data", test, **chosen)
    assert unseen == blank
    assert rare + 0.05 < unseen < common - 0.05


def test_unseen_categories_are_named(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = read_test_text(project / "data")
    changed = table.with_columns(
        sex=pl.Series(["other", "other", *table["sex"][2:]]),
        tbp_tile_type=pl.Series([f"3D: {i % 7}" for i in range(len(table))]),
    )
    predict_rows(project, tmp_path / "data", changed, ensemble=project / "ensemble" / "engineered")
    lines = {line.split()[1]: line for line in capsys.readouterr().err.splitlines()}
    assert '"An institution never seen" (1 rows)' in lines["attribution"]
    assert '"other" (2 rows)' in lines["sex"]
    assert lines["tbp_tile_type"].count(" rows)") == 5
    assert "and 2 more" in lines["tbp_tile_type"]
    assert "copyright_license" not in lines
    assert "tbp_lv_location" not in lines


@pytest.mark.parametrize("name", ["engineered", "blend"])
def test_training_rows_are_named(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    ensemble = project / "ensemble" / name
    if name == "blend":
        members = tuple(project / "ensemble" / each for each in ("raw", "engineered"))
        settings = {"ensembles": members, "data": project / "data", "output_dir": tmp_path}
        ensemble = write_blend(BlendSettings.model_validate({**settings, "calibrate": "platt"}))
    test = read_test_text(project / "data")
    train = pl.read_csv(project / "data" / "train-metadata.csv", infer_schema=False)
    both = pl.concat([test, train[20:25].select(test.columns)])
    chosen = {"ensemble": ensemble, "embeddings": ()}
    predict_rows(project, tmp_path / "data", both, **chosen)
    expected = (
        f"warning: 5 of 35 rows, such as {train['isic_id'][20]}, were in the fit, so their scores "
        f"are too good; their out-of-fold scores are in the ensemble's oof.parquet\n"
    )
    assert expected in capsys.readouterr().err
    predict_rows(project, tmp_path / "none", test, **chosen)
    assert "were in the fit" not in capsys.readouterr().err


def test_a_missing_column_is_named(project: Path, tmp_path: Path) -> None:
    data = copy_tree(project, tmp_path, "data")
    read_test_text(data).drop("tbp_lv_y").write_csv(data / "test-metadata.csv")
    with pytest.raises(UserError, match=r"test-metadata.csv lacks the column tbp_lv_y"):
        predict_table(project, "engineered", data=data)


def test_missing_embeddings_are_refused(project: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --embeddings outputs/embeddings/tiny"):
        predict_table(project, embeddings=())
    root = copy_tree(project, tmp_path, "embeddings/tiny")
    path = shard_path(root, "test", 2, 0)
    shard = pl.read_parquet(path)
    shard[2:].write_parquet(path)
    first = shard["isic_id"][0]
    message = f"lacks the test embeddings of 2 of 30 images, the first is {first}"
    with pytest.raises(UserError, match=message):
        predict_table(project, embeddings=root)


def test_embeddings_of_another_plan_or_config_are_refused(project: Path, tmp_path: Path) -> None:
    root = copy_tree(project, tmp_path, "embeddings/tiny")
    train = Dataset(project / "data").metadata("train")
    write_run(root, "test", draw_folds(train, 3, 5))
    with pytest.raises(UserError, match="were made with the fold plan"):
        predict_table(project, embeddings=root)
    other = Path(shutil.copytree(project / "embeddings" / "tiny", tmp_path / "huge"))
    write_run(other, "test", draw_folds(train, 3, 42))
    message = "needs tiny; --embeddings lacks tiny and also has huge"
    with pytest.raises(UserError, match=message):
        predict_table(project, embeddings=other)


def test_a_table_of_the_dataset_is_not_overwritten(project: Path, tmp_path: Path) -> None:
    data = copy_tree(project, tmp_path, "data")
    with pytest.raises(UserError, match="was not written by this command"):
        predict_table(project, "engineered", data=data, output=data / "test-metadata.csv")
    (data / "folder.csv").mkdir()
    with pytest.raises(UserError, match="is not a regular file; choose another --output"):
        predict_table(project, "engineered", data=data, output=data / "folder.csv")


def test_a_file_in_place_of_the_output_folder_is_reported(project: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*choose another output folder"):
        predict_table(project, "engineered", output=tmp_path / "file" / "s.csv")


@pytest.mark.parametrize("place", ["output", "models", "drift", "manifest", "link", "artifact"])
def test_only_a_submission_is_replaced(project: Path, tmp_path: Path, place: str) -> None:
    """No other file with the name of the submission, its manifest or its models is."""
    output = tmp_path / "s.csv"
    names = {"models": "s_models.parquet", "drift": "s_drift.parquet", "manifest": "s.csv.json"}
    taken = names.get(place, "s.csv")
    (tmp_path / "images").write_bytes(b"images")
    if place == "link":
        output.symlink_to(tmp_path / "images")
    else:
        (tmp_path / taken).write_bytes(b"{}")
    if place == "artifact":
        write_manifest(output, format="onnx")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="was not written by this command"):
        predict_table(project, "engineered", output=output)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_submission_is_written_again_even_if_the_last_run_was_killed(
    project: Path, tmp_path: Path
) -> None:
    output = tmp_path / "s.csv"
    first = predict_table(project, "engineered", output=output)
    assert predict_table(project, "engineered", output=output).equals(first)
    for path in (output, tmp_path / "s_models.parquet"):
        path.unlink()
        assert predict_table(project, "engineered", output=output).equals(first)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"checkpoints": {"0": "x", "1": "y", "2": "z"}}, "other trained weights than those"),
        ({"checkpoints": {"0": "a", "2": "c"}}, "lack those by fold 1; export it in the same"),
        ({"tta": "d4"}, r"another --tta \(d4, not none\)"),
        ({"preprocess": {"size": 16}}, "another preprocessing"),
    ],
)
def test_embeddings_of_another_origin_are_refused(
    project: Path, tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    """The constants of the image score would not fit their logits."""
    root = copy_tree(project, tmp_path, "embeddings/tiny")
    path = root / "test" / "run.json"
    run = json.loads(path.read_text())
    write_json(path, run | {"engines": {"0": "int8", "1": "int8", "2": "int8"}})
    predict_table(project, embeddings=root)  # other engines of the same weights may be used
    write_json(path, run | changed)
    with pytest.raises(UserError, match=message):
        predict_table(project, embeddings=root)


def test_prediction_blends_like_fitting(data: Path, three_libraries: Path, tmp_path: Path) -> None:
    predict_submission(
        PredictSettings(data=data, ensemble=three_libraries, output=tmp_path / "s.csv")
    )
    models = pl.read_parquet(tmp_path / "s_models.parquet")
    submission = pl.read_csv(tmp_path / "s.csv")
    oof = pl.read_parquet(three_libraries / "oof.parquet")
    assert models.columns == ["isic_id", *oof.columns[3:], "std"]
    assert models["blend"].equals(submission["target"], check_names=False)
    names = oof.columns[3:-1]
    scores = {name: models[name].to_numpy() for name in names}
    reference = {name: oof[name].to_numpy() for name in names}
    weights = {**dict.fromkeys(LIBRARIES, 1), "lightgbm": 2}
    np.testing.assert_array_equal(models["blend"], blend(scores, weights, reference))
    manifest = json.loads((tmp_path / "s.csv.json").read_text())
    digest = sha256(tmp_path / "s_models.parquet")
    assert manifest["models"] == {"file": "s_models.parquet", "sha256": digest}


def test_a_row_gets_the_same_score_on_its_own(
    data: Path, three_libraries: Path, tmp_path: Path, cli: Cli
) -> None:
    one = tmp_path / "one"
    one.mkdir()
    read_test_text(data)[:1].write_csv(one / "test-metadata.csv")
    for folder in (data, one):
        flags = ["--ensemble", three_libraries, "--out", tmp_path / f"{folder.name}.csv"]
        assert cli("infer", "predict", "--data", folder, *flags).code == 0
    alone = pl.read_parquet(tmp_path / "one_models.parquet")
    among_others = pl.read_parquet(tmp_path / f"{data.name}_models.parquet")
    assert alone.rows() == among_others.filter(isic_id=alone["isic_id"][0]).rows()
