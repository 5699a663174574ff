"""Fitting an ensemble: its files, that it repeats itself, and its refusals."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from infer.ensemble.boosting.libraries import LIBRARIES
from isic import schema
from isic.dataset import Dataset
from isic.folds import draw_folds, read_folds
from isic.runtime.errors import UserError
from tests.support.commands import Cli
from tests.support.ensembles import (
    NUM_FOLDS,
    fit_small,
    read_blend,
    read_files,
    train_table,
    write_embeddings,
    write_train,
)


def test_the_folder_holds_all_that_the_manifest_names(fitted: Path, data: Path) -> None:
    manifest = json.loads((fitted / "ensemble.json").read_text())
    assert set(manifest["files"]) == {path.name for path in fitted.iterdir()} - {"ensemble.json"}
    names = {f"lightgbm_fold_{k}_seed_{seed}.txt" for k in range(3) for seed in range(2)}
    assert names == {entry["file"] for entry in manifest["boosters"]}
    assert (fitted / "lightgbm_fold_0_seed_0.txt").read_text().startswith("tree\n")
    assert manifest["folds_digest"] == draw_folds(train_table(data), 3, 42).digest
    assert read_folds(fitted / "folds.parquet").digest == manifest["folds_digest"]


def test_the_planted_signal_is_found(fitted: Path) -> None:
    assert read_blend(fitted)["auc"] > 0.75


def test_threads_and_the_order_of_rows_do_not_change_the_bytes(
    fitted: Path, data: Path, tmp_path: Path
) -> None:
    expected = read_files(fitted)
    chosen = {"features": "engineered", "seeds": 2}
    assert read_files(fit_small(data, tmp_path / "threads", num_threads=3, **chosen)) == expected
    table = train_table(data).sample(fraction=1, shuffle=True, seed=4)
    shuffled = write_train(tmp_path / "shuffled", table)
    again = read_files(fit_small(shuffled, tmp_path / "order", **chosen))
    differing = {name for name in expected if again[name] != expected[name]}
    assert differing == {"ensemble.json"}  # it has the digest of the metadata file


def test_another_seed_gives_other_boosters(fitted: Path, data: Path, tmp_path: Path) -> None:
    fit_small(data, tmp_path, features="engineered", seed=7)
    other = pl.read_parquet(tmp_path / "engineered" / "oof.parquet")
    assert "lightgbm_seed_7" in other.columns
    assert not other["blend"].equals(pl.read_parquet(fitted / "oof.parquet")["blend"])


def test_an_ensemble_is_replaced_only_with_force(data: Path, tmp_path: Path) -> None:
    chosen = {"features": "numeric", "seeds": 2, "num_rounds": 2}
    root = fit_small(data, tmp_path, **chosen)
    before = read_files(root)
    for change, difference in (
        ({"seeds": 1}, "settings.seeds = 2, now it is 1"),
        ({"lightgbm": {"max_depth": 3}}, "parameters.lightgbm.max_depth = 4, now it is 3"),
        ({"libraries": "lightgbm,xgboost"}, "weights.xgboost = None, now it is 1.0"),
    ):
        message = f"{difference}; choose another --name, or replace it with --force"
        with pytest.raises(UserError, match=message):
            fit_small(data, tmp_path, **{**chosen, **change})
    fit_small(data, tmp_path, **chosen)
    assert read_files(root) == before
    fit_small(data, tmp_path, **{**chosen, "seeds": 1}, force=True)
    assert not (root / "lightgbm_fold_0_seed_1.txt").exists()


def test_a_single_category_is_enough(data: Path, tmp_path: Path) -> None:
    fit_small(data, tmp_path, features="sex", num_rounds=2)
    assert (tmp_path / "sex" / "ensemble.json").is_file()


def test_an_output_folder_that_is_a_file_is_a_user_error(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*; choose another output folder"):
        fit_small(data, tmp_path / "file", features="sex", num_rounds=2)


def test_the_image_score_is_an_ensemble_and_a_feature(
    data: Path, embeddings: Path, tmp_path: Path
) -> None:
    image = fit_small(data, tmp_path, features="image", embeddings=embeddings)
    raw = fit_small(data, tmp_path, features="raw", embeddings=embeddings)
    both = fit_small(data, tmp_path, features="multimodal", embeddings=embeddings)
    assert read_blend(both)["auc"] > max(read_blend(image)["auc"], read_blend(raw)["auc"])
    assert not list(image.glob("lightgbm*"))
    manifest = json.loads((both / "ensemble.json").read_text())
    assert manifest["embeddings"]["tiny"]["config"] == "tiny"
    state = json.loads((both / "state.json").read_text())
    assert state["names"][-2:] == ["image_score.tiny", "image_score_patient_diff.tiny"]
    assert set(state["image"]["networks"]["tiny"]["scaler"]) == {"0", "1", "2"}


def test_the_fold_plan_of_the_embeddings_is_used(data: Path, tmp_path: Path) -> None:
    folds = draw_folds(train_table(data), 4, 9)
    embeddings = write_embeddings(tmp_path / "four", data, folds)
    chosen = {"features": "numeric", "embeddings": embeddings, "num_folds": None}
    fit_small(data, tmp_path, **chosen, num_rounds=2)
    assert read_folds(tmp_path / "numeric" / "folds.parquet").digest == folds.digest


def test_a_plan_that_the_dataset_got_after_the_embeddings_is_not_ignored(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = train_table(data)
    pinned = write_train(tmp_path / "pinned", table)
    shutil.copy(data / "test-metadata.csv", pinned)
    draw_folds(table, NUM_FOLDS, 7).write(pinned / "folds.parquet")
    old = write_embeddings(tmp_path / "old", pinned)
    new = write_embeddings(tmp_path / "new", pinned, draw_folds(table, NUM_FOLDS, 7), seed=1)
    chosen = {"features": "sex,image", "num_rounds": 2}
    words = f"{pinned}/folds.parquet is another fold plan than {old}/folds.parquet, .* or remove"
    for given in (old, [old, new]):
        with pytest.raises(UserError, match=words):
            fit_small(pinned, tmp_path, **chosen, embeddings=given)
    fit_small(pinned, tmp_path, **chosen, embeddings=new)
    assert "warning" not in capsys.readouterr().err
    fit_small(pinned, tmp_path, **chosen, embeddings=[new, old])
    assert f"{old} has another fold plan than {pinned}/folds.parquet" in capsys.readouterr().err


def test_a_blank_column_is_noted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blank = train_table(data).with_columns(age_approx=pl.lit(None), sex=pl.lit(None))
    fit_small(write_train(tmp_path / "blank", blank), tmp_path, features="raw", num_rounds=2)
    note = "note: 2 features are blank in every row, the first is age_approx"
    assert note in capsys.readouterr().out


def with_two_positive_patients(table: pl.DataFrame) -> pl.DataFrame:
    patients = table.filter(target=1)["patient_id"].unique().sort()[:2]
    return table.with_columns(target=pl.col("patient_id").is_in(patients.implode()).cast(pl.Int8))


BAD_TABLES = {
    "lacks the column tbp_lv_H": lambda t: t.drop("tbp_lv_H"),
    "lacks the column patient_id": lambda t: t.drop("patient_id"),
    "lacks the column target": lambda t: t.drop("target"),
    "every target is 0": lambda t: t.with_columns(target=pl.lit(0)),
    "2 patients with a positive row are too few for 3 folds": with_two_positive_patients,
    "too few for 3 folds": lambda t: t.with_columns(patient_id=pl.lit("IP_1")),
    "every target is 1": lambda t: t.filter(target=1)[:1],
    "must hold finite numbers": lambda t: t.with_columns(tbp_lv_H=pl.lit(float("inf"))),
}


@pytest.mark.parametrize("message", BAD_TABLES)
def test_bad_tables_are_refused(data: Path, tmp_path: Path, message: str) -> None:
    root = write_train(tmp_path / "bad", BAD_TABLES[message](train_table(data)))
    with pytest.raises(UserError, match=message):
        fit_small(root, tmp_path, features="engineered")
    assert not (tmp_path / "engineered").exists()


def test_a_dataset_of_ids_targets_and_patients_can_be_scored_by_its_images(
    data: Path, tmp_path: Path
) -> None:
    table = train_table(data).select(schema.ID, schema.TARGET, schema.PATIENT)
    plain = write_train(tmp_path / "plain", table)
    Dataset(data).metadata("test").select(schema.ID).write_csv(plain / "test-metadata.csv")
    embeddings = write_embeddings(tmp_path / "e", plain)
    fit_small(plain, tmp_path, features="image", embeddings=embeddings)
    assert (tmp_path / "image_e" / "ensemble.json").is_file()


def test_real_rows_beat_the_known_baseline_of_raw_numbers(real_data: Path, tmp_path: Path) -> None:
    fit_small(real_data / "real-tabular", tmp_path, features="numeric", num_folds=5, num_rounds=200)
    assert read_blend(tmp_path / "numeric")["auc"] > 0.92


def test_settings_that_contradict_the_fold_plan_are_refused(
    data: Path, embeddings: Path, tmp_path: Path
) -> None:
    pinned = write_train(tmp_path / "pinned", train_table(data))
    draw_folds(train_table(data), 3, 7).write(pinned / "folds.parquet")
    image = {"features": "image", "embeddings": embeddings}
    for root, given in ((data, image), (pinned, {"features": "tbp_lv_H"})):
        for contradiction in ({"num_folds": 5}, {"num_folds": 3, "split_seed": 8}):
            with pytest.raises(UserError, match=r"folds\.parquet .*; leave --\w+ out"):
                fit_small(root, tmp_path / "out", **given, **contradiction)
    assert not (tmp_path / "out").exists()


def test_the_manifest_records_the_folds_that_were_used(data: Path, tmp_path: Path) -> None:
    pinned = write_train(tmp_path / "pinned", train_table(data))
    draw_folds(train_table(data), 4, 7).write(pinned / "folds.parquet")
    recorded = {}
    for name, root, given in (
        ("plan", pinned, {"num_folds": None}),
        ("same", pinned, {"num_folds": 4, "split_seed": 7}),
        ("drawn", data, {"split_seed": 7}),
        ("default", data, {"num_folds": None}),
    ):
        chosen = {"features": "tbp_lv_H", "num_rounds": 2, "name": name}
        fit_small(root, tmp_path / "out", **chosen, **given)
        manifest = json.loads((tmp_path / "out" / name / "ensemble.json").read_text())
        used = manifest["settings"]
        recorded[name] = (used["num_folds"], used.get("split_seed"))
    assert recorded == {"plan": (4, None), "same": (4, None), "drawn": (3, 7), "default": (5, 42)}


def test_a_folder_of_something_else_is_not_written_into(data: Path, tmp_path: Path) -> None:
    """A training run has a fold plan too, and a dataset would use one as its own."""
    run = tmp_path / "demo"
    run.mkdir()
    (run / "folds.parquet").write_bytes(b"the plan of a run")
    with pytest.raises(UserError, match=r"folds\.parquet exists and was not written by this"):
        fit_small(data, tmp_path, name="demo", features="raw")
    assert (run / "folds.parquet").read_bytes() == b"the plan of a run"
    own = Path(shutil.copytree(data, tmp_path / "own"))
    with pytest.raises(UserError, match="holds a dataset; choose another --output_dir or --name"):
        fit_small(data, tmp_path, name="own", features="raw")
    assert sorted(path.name for path in own.iterdir()) == sorted(p.name for p in data.iterdir())


def test_a_fit_that_was_killed_is_repeated(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("infer.ensemble.fit.write_ensemble_manifest", killed)
        fit_small(data, tmp_path, name="raw", features="raw", num_rounds=2)
    assert (tmp_path / "raw" / "oof.parquet").is_file()
    fit_small(data, tmp_path, name="raw", features="raw", num_rounds=2)
    assert not (tmp_path / "raw" / "begun.json").exists()


def test_every_library_has_its_boosters_scores_and_settings(three_libraries: Path) -> None:
    manifest = json.loads((three_libraries / "ensemble.json").read_text())
    assert {entry["library"] for entry in manifest["boosters"]} == set(LIBRARIES)
    assert len(manifest["boosters"]) == 3 * NUM_FOLDS * 2
    assert manifest["weights"]["lightgbm"] == 2
    assert manifest["parameters"]["catboost"]["depth"] == 3
    assert manifest["parameters"]["xgboost"]["num_rounds"] == 8
    xgboost = json.loads((three_libraries / "xgboost_fold_0_seed_1.json").read_text())
    assert xgboost["learner"]
    catboost = json.loads((three_libraries / "catboost_fold_0_seed_1.json").read_text())
    assert catboost["oblivious_trees"]
    oof = pl.read_parquet(three_libraries / "oof.parquet")
    models = [f"{library}_seed_{seed}" for library in LIBRARIES for seed in range(2)]
    assert oof.columns == ["isic_id", "fold", "target", *models, "blend"]
    assert {"lightgbm", "xgboost-cpu", "catboost"} < set(manifest["versions"])


def test_the_command_fits_and_writes_a_report(
    data: Path, library_config: Path, three_libraries: Path, tmp_path: Path, cli: Cli
) -> None:
    """With another number of threads and the short names of flags, the bytes are the same."""
    flags = ["--config", library_config, "--data", data, "--out", tmp_path, "--name", "three"]
    ended = cli("infer", "fit", *flags, "--num_threads", 3)
    assert ended.code == 0, ended.err
    again = read_files(tmp_path / "three")
    report = again.pop("report.html").decode()
    assert again == read_files(three_libraries)
    assert "<h1>three</h1>" in report
    assert ended.out.endswith(f"report: {tmp_path / 'three' / 'report.html'}\n")
