"""Predicting: the submission's mode, that nothing is fitted, and every artifact that must be refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.embedding.store import shard_path
from infer.ensemble.fit import fit_ensemble
from infer.ensemble.predict import PredictSettings, predict_submission
from isic import schema
from isic.dataset import Dataset
from isic.folds import draw_folds
from isic.runtime.errors import UserError
from isic.runtime.files import sha256, write_json, write_manifest
from tests.support.ensembles import fit_settings, write_dataset, write_embeddings, write_run


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `embeddings/tiny`, and ensembles of tables, images and both."""
    root = tmp_path_factory.mktemp("predict")
    data = write_dataset(root / "data")
    embeddings = write_embeddings(root / "embeddings" / "tiny", data)
    for features in ("engineered", "raw", "image", "raw,image", "multimodal"):
        fit_ensemble(
            fit_settings(
                data, root / "ensemble", features=features, embeddings=embeddings, num_rounds=20
            )
        )
    return root


def run(road: Path, ensemble: str = "multimodal_tiny", **more: object) -> pl.DataFrame:
    defaults = {
        "data": road / "data",
        "ensemble": road / "ensemble" / ensemble,
        "embeddings": road / "embeddings" / "tiny",
        "output": road / "submission.csv",
    }
    chosen = PredictSettings.model_validate(defaults | more)
    predict_submission(chosen)
    return pl.read_csv(chosen.output)


def copy(road: Path, tmp_path: Path, part: str) -> Path:
    return Path(shutil.copytree(road / part, tmp_path / Path(part).name))


@pytest.mark.parametrize("ensemble", ["engineered", "image_tiny", "multimodal_tiny"])
def test_every_row_has_a_score_in_the_tables_order(road: Path, ensemble: str) -> None:
    submission = run(road, ensemble)
    assert submission.columns == ["isic_id", "target"]
    assert (
        submission["isic_id"].to_list()
        == Dataset(road / "data").metadata("test")["isic_id"].to_list()
    )
    assert submission["target"].is_between(0, 1).all() and submission["target"].n_unique() > 10


def test_the_manifest_leads_back_to_the_ensemble_and_the_embeddings(road: Path) -> None:
    run(road)
    manifest = json.loads((road / "submission.csv.json").read_text())
    assert manifest["sha256"] == sha256(road / "submission.csv")
    assert manifest["ensemble"] == sha256(road / "ensemble" / "multimodal_tiny" / "ensemble.json")
    assert manifest["embeddings"]["engines"] == {"0": "a", "1": "b", "2": "c"}


def test_the_sample_submission_gives_the_order(road: Path, tmp_path: Path) -> None:
    data = copy(road, tmp_path, "data")
    before = run(road)
    sample = before.sample(fraction=1, shuffle=True, seed=1).with_columns(target=pl.lit(0.3))
    sample.write_csv(data / "sample_submission.csv")
    submission = run(road, data=data, output=tmp_path / "s.csv")
    assert (
        submission["isic_id"].to_list()
        == sample["isic_id"].to_list()
        != before["isic_id"].to_list()
    )
    assert submission.sort("isic_id").equals(before.sort("isic_id"))


@pytest.mark.parametrize(("change", "count"), [("fewer", 1), ("more", 1)])
def test_a_sample_submission_of_other_ids_is_refused(
    road: Path, tmp_path: Path, change: str, count: int
) -> None:
    data = copy(road, tmp_path, "data")
    sample = run(road)
    extra = pl.DataFrame({"isic_id": ["ISIC_9"], "target": [0.3]})
    (sample[1:] if change == "fewer" else pl.concat([sample, extra])).write_csv(
        data / "sample_submission.csv"
    )
    with pytest.raises(UserError, match=f"{count} of the 3. ids in .* are not in"):
        run(road, data=data)


@pytest.mark.parametrize("text", ["", "id,target\n1,0\n", "isic_id,target\nISIC_1,0\nISIC_1,0\n"])
def test_a_sample_submission_that_is_none_is_refused(road: Path, tmp_path: Path, text: str) -> None:
    data = copy(road, tmp_path, "data")
    (data / "sample_submission.csv").write_text(text)
    with pytest.raises(UserError, match=r"sample_submission\.csv"):
        run(road, data=data)


def test_scores_do_not_depend_on_the_other_patients_or_the_order(
    road: Path, tmp_path: Path
) -> None:
    everything = run(road)
    table = pl.read_csv(road / "data" / "test-metadata.csv", infer_schema=False)
    patient = table["patient_id"][4]
    data = tmp_path / "data"
    data.mkdir()
    some = table.filter(patient_id=patient).sample(fraction=1, shuffle=True, seed=2)
    some.write_csv(data / "test-metadata.csv")
    mine = run(road, data=data, output=tmp_path / "s.csv")
    joined = mine.join(everything, on="isic_id")
    assert len(joined) == len(some) and joined["target"].equals(
        joined["target_right"], check_names=False
    )


def test_one_row_of_an_institution_never_seen_with_blanks(road: Path, tmp_path: Path) -> None:
    table = pl.read_csv(road / "data" / "test-metadata.csv", infer_schema=False)
    (tmp_path / "data").mkdir()
    one = table[:1].with_columns(pl.lit(None).alias("age_approx"), pl.lit("").alias("sex"))
    assert one["attribution"][0] == "An institution never seen"
    one.write_csv(tmp_path / "data" / "test-metadata.csv")
    submission = run(road, data=tmp_path / "data", output=tmp_path / "s.csv")
    assert len(submission) == 1 and 0 <= submission["target"][0] <= 1


def scored(road: Path, folder: Path, table: pl.DataFrame, **more: object) -> pl.Series:
    """The scores of another test table."""
    folder.mkdir()
    table.write_csv(folder / "test-metadata.csv")
    return run(road, data=folder, output=folder / "s.csv", **more)["target"]


@pytest.mark.parametrize("column", schema.CATEGORICAL)
def test_an_unseen_category_is_a_blank_and_not_the_commonest(
    road: Path, tmp_path: Path, column: str
) -> None:
    """Boosters that look at one column alone, and so at nothing that could hide the difference."""
    rng = np.random.default_rng(0)
    size = 600
    ids = [f"ISIC_{i:07d}" for i in range(size)]
    values = rng.choice(["a", "b"], size, p=[0.7, 0.3])
    target = rng.random(size) < np.where(values == "a", 0.6, 0.1)
    (tmp_path / "train").mkdir()
    pl.DataFrame({"isic_id": ids, "target": target.astype(int), column: values}).write_csv(
        tmp_path / "train" / "train-metadata.csv"
    )
    fit_ensemble(fit_settings(tmp_path / "train", tmp_path / "ensemble", features=column))
    one = {"isic_id": [f"ISIC_9{i}" for i in range(4)], column: ["a", "b", "never seen", None]}
    common, rare, unseen, blank = scored(
        road, tmp_path / "data", pl.DataFrame(one), ensemble=tmp_path / "ensemble", embeddings=None
    )
    assert unseen == blank
    assert rare + 0.05 < unseen < common - 0.05


def test_unseen_categories_are_named(
    road: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pl.read_csv(road / "data" / "test-metadata.csv", infer_schema=False)
    changed = table.with_columns(
        sex=pl.Series(["other", "other", *table["sex"][2:]]),
        tbp_tile_type=pl.Series([f"3D: {i % 7}" for i in range(len(table))]),
    )
    scored(road, tmp_path / "data", changed, ensemble=road / "ensemble" / "engineered")
    lines = {line.split()[1]: line for line in capsys.readouterr().err.splitlines()}
    assert '"An institution never seen" (1 rows)' in lines["attribution"]
    assert '"other" (2 rows)' in lines["sex"]
    assert lines["tbp_tile_type"].count(" rows)") == 5 and "and 2 more" in lines["tbp_tile_type"]
    assert "copyright_license" not in lines and "tbp_lv_location" not in lines


FEW = "3 of the 9 patients have fewer than 2 lesions, percentile 5 of the 40 training patients"


@pytest.mark.parametrize(
    ("ensemble", "relative"),
    [("engineered", True), ("raw+image_tiny", True), ("image_tiny", False), ("raw", False)],
)
def test_patients_with_few_lesions_are_warned_of_or_refused(
    road: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], ensemble: str, relative: bool
) -> None:
    table = pl.read_csv(road / "data" / "test-metadata.csv", infer_schema=False)
    largest = table["patient_id"].value_counts().sort("count")["patient_id"][-1]
    alone = table.filter(patient_id=largest)["isic_id"][:3].implode()
    patient = pl.when(pl.col("isic_id").is_in(alone)).then("isic_id").otherwise("patient_id")
    changed = table.with_columns(patient.alias("patient_id"))
    chosen = {"ensemble": road / "ensemble" / ensemble}
    before = run(road, ensemble)["target"]
    assert "lesions" not in capfd.readouterr().err
    after = scored(road, tmp_path / "data", changed, **chosen)
    assert (FEW in capfd.readouterr().err) == relative == (not after.equals(before))
    if relative:
        with pytest.raises(UserError, match=FEW):
            scored(road, tmp_path / "again", changed, few="refuse", **chosen)
        assert not (tmp_path / "again" / "s.csv").exists()
    else:
        scored(road, tmp_path / "again", changed, few="refuse", **chosen)


def test_a_test_row_gets_what_a_training_row_of_every_fold_model_would(road: Path) -> None:
    """The image ensemble's score is the logistic of the mean over folds of the standardised logits."""
    state = json.loads((road / "ensemble" / "image_tiny" / "state.json").read_text())
    name = run(road, "image_tiny")["isic_id"][0]
    standardised = []
    for k, (mean, std) in state["image"].items():
        part = pl.read_parquet(shard_path(road / "embeddings" / "tiny", "test", int(k), 0))
        standardised.append((part.filter(isic_id=name)["logit"][0] - mean) / std)
    expected = 1 / (1 + np.exp(-np.mean(standardised)))
    assert run(road, "image_tiny")["target"][0] == pytest.approx(expected, rel=1e-6)


def test_a_folder_with_one_ensemble_will_do_and_with_several_not(
    road: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"several ensembles, choose one: .*engineered.*image_tiny"):
        run(road, ensemble="")
    shutil.copytree(road / "ensemble" / "engineered", tmp_path / "ensemble" / "engineered")
    assert run(road, ensemble=tmp_path / "ensemble").equals(run(road, "engineered"))
    with pytest.raises(UserError, match="holds no finished ensemble"):
        run(road, ensemble=tmp_path / "nowhere")


def test_an_ensemble_without_its_manifest_is_not_finished(road: Path, tmp_path: Path) -> None:
    root = copy(road, tmp_path, "ensemble/engineered")
    (root / "ensemble.json").unlink()
    with pytest.raises(UserError, match="holds no finished ensemble"):
        run(road, ensemble=root)


@pytest.mark.parametrize(
    "name", ["lightgbm_fold_1_seed_0.txt", "state.json", "folds.parquet", "oof.parquet"]
)
def test_a_file_cut_short_or_gone_is_refused(road: Path, tmp_path: Path, name: str) -> None:
    root = copy(road, tmp_path, "ensemble/multimodal_tiny")
    (root / name).write_bytes((root / name).read_bytes()[:-40])
    with pytest.raises(UserError, match=f"{name} does not match ensemble.json"):
        run(road, ensemble=root)
    (root / name).unlink()
    with pytest.raises(UserError, match=f"no such file: .*{name}"):
        run(road, ensemble=root)


def forge(root: Path, **changes: object) -> None:
    """Changes fields of the state, and the manifest so that it fits."""
    state = json.loads((root / "state.json").read_text()) | changes
    (root / "state.json").write_text(json.dumps(state))
    manifest = json.loads((root / "ensemble.json").read_text())
    manifest["files"]["state.json"] = sha256(root / "state.json")
    (root / "ensemble.json").write_text(json.dumps(manifest))


def test_a_changed_feature_list_is_refused(road: Path, tmp_path: Path) -> None:
    root = copy(road, tmp_path, "ensemble/engineered")
    names = json.loads((root / "state.json").read_text())["names"]
    forge(root, names=[*names[:-1], "gone"])
    with pytest.raises(
        UserError, match=r"was fitted on 200 features, .*different: gone, patient_lof"
    ):
        run(road, ensemble=root)
    forge(root, names=names[::-1])
    with pytest.raises(UserError, match="their order"):
        run(road, ensemble=root)


def test_a_manifest_of_another_version_is_refused(road: Path, tmp_path: Path) -> None:
    root = copy(road, tmp_path, "ensemble/engineered")
    (root / "ensemble.json").write_text("{}")
    with pytest.raises(UserError, match="is of another version"):
        run(road, ensemble=root)


def test_a_missing_column_is_named(road: Path, tmp_path: Path) -> None:
    data = copy(road, tmp_path, "data")
    pl.read_csv(data / "test-metadata.csv", infer_schema=False).drop("tbp_lv_y").write_csv(
        data / "test-metadata.csv"
    )
    with pytest.raises(UserError, match=r"test-metadata.csv lacks the column tbp_lv_y"):
        run(road, "engineered", data=data)


def test_missing_embeddings_are_refused(road: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --embeddings outputs/embeddings/tiny"):
        run(road, embeddings=None)
    root = copy(road, tmp_path, "embeddings/tiny")
    path = shard_path(root, "test", 2, 0)
    part = pl.read_parquet(path)
    part[2:].write_parquet(path)
    with pytest.raises(
        UserError,
        match=f"lacks the test embeddings of 2 of 30 images, the first is {part['isic_id'][0]}",
    ):
        run(road, embeddings=root)


def test_embeddings_of_another_plan_or_config_are_refused(road: Path, tmp_path: Path) -> None:
    root = copy(road, tmp_path, "embeddings/tiny")
    train = Dataset(road / "data").metadata("train")
    write_run(root, "test", draw_folds(train, 3, 5))
    with pytest.raises(UserError, match="were made with the fold plan"):
        run(road, embeddings=root)
    other = Path(shutil.copytree(road / "embeddings" / "tiny", tmp_path / "huge"))
    write_run(other, "test", draw_folds(train, 3, 42))
    with pytest.raises(UserError, match=r"were made with another config \(huge, not tiny\)"):
        run(road, embeddings=other)


def test_a_table_of_the_dataset_is_not_written_over(road: Path, tmp_path: Path) -> None:
    data = copy(road, tmp_path, "data")
    with pytest.raises(UserError, match="was not written by this command"):
        run(road, "engineered", data=data, output=data / "test-metadata.csv")
    with pytest.raises(UserError, match="is not a regular file; choose another --output"):
        run(road, "engineered", data=data, output=data)


@pytest.mark.parametrize("place", ["output", "models", "manifest", "link", "artifact"])
def test_only_a_submission_is_replaced(road: Path, tmp_path: Path, place: str) -> None:
    """No other file under its name, nor under those of what lies beside it."""
    output = tmp_path / "s.csv"
    taken = {"models": "s_models.parquet", "manifest": "s.csv.json"}.get(place, "s.csv")
    (tmp_path / "images").write_bytes(b"images")
    if place == "link":
        output.symlink_to(tmp_path / "images")
    else:
        (tmp_path / taken).write_bytes(b"{}")
    if place == "artifact":
        write_manifest(output, format="onnx")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="was not written by this command"):
        run(road, "engineered", output=output)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_submission_is_written_again_even_if_the_last_run_was_killed(
    road: Path, tmp_path: Path
) -> None:
    output = tmp_path / "s.csv"
    first = run(road, "engineered", output=output)
    assert run(road, "engineered", output=output).equals(first)
    for path in (output, tmp_path / "s_models.parquet"):
        path.unlink()
        assert run(road, "engineered", output=output).equals(first)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"checkpoints": {"0": "x", "1": "y", "2": "z"}}, "other trained weights than those"),
        ({"tta": "d4"}, r"another --tta \(d4, not none\)"),
        ({"preprocess": {"size": 16}}, "another preprocessing"),
    ],
)
def test_embeddings_of_other_models_or_views_than_fitted_with_are_refused(
    road: Path, tmp_path: Path, changed: dict[str, object], words: str
) -> None:
    """Their logits would be standardised by constants of other ones."""
    root = copy(road, tmp_path, "embeddings/tiny")
    said = json.loads((root / "test" / "run.json").read_text())
    write_json(
        root / "test" / "run.json", said | {"engines": {"0": "int8", "1": "int8", "2": "int8"}}
    )
    run(road, embeddings=root)  # other engines of the same weights may be used
    write_json(root / "test" / "run.json", said | changed)
    with pytest.raises(UserError, match=words):
        run(road, embeddings=root)
