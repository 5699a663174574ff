import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from infer.submission.contents import open_bundle
from infer.submission.submit import SubmitSettings, submit
from isic.runtime.errors import UserError
from isic.runtime.files import manifest_path, read_json, write_json
from tests.infer.submission.conftest import Project
from tests.support.commands import Cli, run_module

PARTS = {
    *("bundle.json", "submit.py", "code", "ensembles", "networks", "notebook"),
    "dataset-metadata.json",
}


def test_a_bundle_holds_what_its_ensemble_needs(made: Path, project: Project) -> None:
    assert {path.name for path in made.iterdir()} == PARTS
    assert {path.name for path in (made / "code").iterdir()} == {"isic", "infer"}
    assert not list(made.rglob("*.pth"))
    assert not list(made.rglob("report.html"))
    for name in ("tiny", "tiny_b"):
        for fold in range(3):
            there = made / "networks" / name / f"fold_{fold}" / "model.onnx"
            assert (
                there.read_bytes() == (project.runs / name / f"fold_{fold}/model.onnx").read_bytes()
            )
    candidates = open_bundle(made).candidates
    assert [candidate.networks for candidate in candidates] == [
        ("tiny", "tiny_b"),
        ("tiny",),
        (),
    ]
    assert [candidate.members for candidate in candidates] == [None, ("tables", "one"), ("tables",)]
    # The whole blend and its single member have the scores that their own folders report.
    for candidate, name in ((candidates[0], "final"), (candidates[2], "tables")):
        scores = json.loads((project.ensembles / name / "scores.json").read_text())
        assert candidate.pauc == pytest.approx(scores["blend"]["pauc"], abs=1e-9), name


def test_the_metadata_for_kaggle_name_the_dataset_and_no_internet(
    project: Project, tmp_path: Path
) -> None:
    made = project.bundle(tmp_path / "b", owner="someone", title="My skin bundle", cuda="12")
    dataset = read_json(made / "dataset-metadata.json")
    assert dataset["id"] == "someone/my-skin-bundle"
    kernel = read_json(made / "notebook" / "kernel-metadata.json")
    assert kernel["dataset_sources"] == [dataset["id"]]
    assert kernel["enable_internet"] is False
    assert kernel["enable_gpu"] is True
    assert kernel["competition_sources"] == ["isic-2024-challenge"]
    assert (made / "notebook" / kernel["code_file"]).is_file()


@pytest.mark.parametrize("ensemble", ["one", "both"])
def test_an_ensemble_of_images_falls_back_on_the_one_beside_it(
    ensemble: str, project: Project, tmp_path: Path
) -> None:
    made = project.bundle(tmp_path / "b", ensemble)
    first, fallback = open_bundle(made).candidates
    assert first.folder == ensemble
    assert (fallback.folder, fallback.networks) == ("tables", ())


def test_a_given_fallback_may_need_some_of_the_networks(project: Project, tmp_path: Path) -> None:
    fallback = (project.ensembles / "one", project.ensembles / "tables")
    made = project.bundle(tmp_path / "b", "both", fallback=fallback)
    assert [candidate.networks for candidate in open_bundle(made).candidates] == [
        ("tiny", "tiny_b"),
        ("tiny",),
        (),
    ]
    # The one that can be used by itself embeds first.
    assert list(open_bundle(made).networks) == ["tiny", "tiny_b"]


def test_an_ensemble_without_anything_to_fall_back_on_is_refused(
    project: Project, tmp_path: Path
) -> None:
    shutil.copytree(project.ensembles / "one", tmp_path / "ensembles" / "one")
    with pytest.raises(UserError, match=r"no ensemble to fall back on.*--features engineered"):
        project.bundle(tmp_path / "b", ensemble=tmp_path / "ensembles" / "one")  # type: ignore[arg-type]


def test_a_fallback_that_needs_other_networks_is_refused(project: Project, tmp_path: Path) -> None:
    fallback = (project.ensembles / "both",)
    with pytest.raises(UserError, match="needs tiny_b, which the ensemble to submit does not"):
        project.bundle(tmp_path / "b", "one", fallback=fallback)


def test_an_ensemble_with_tables_of_its_own_is_refused(project: Project, tmp_path: Path) -> None:
    ids = pl.read_csv(project.data / "train-metadata.csv")["isic_id"]
    table = tmp_path / "mine.csv"
    pl.DataFrame({"isic_id": ids, "x": range(len(ids))}).write_csv(table)
    flags = ("--features", "raw,mine", "--tables", f"label_free:{table}", "--num_folds", 3)
    run_module(
        *("infer", "fit", "--data", project.data, "--out", tmp_path, "--name", "own"),
        *(*flags, "--seeds", 1, "--num_rounds", 5),
    )
    with pytest.raises(UserError, match="needs the tables mine, which hidden test rows do not"):
        project.bundle(tmp_path / "b", ensemble=tmp_path / "own")  # type: ignore[arg-type]


@pytest.fixture
def runs(project: Project, tmp_path: Path) -> Path:
    """A copy of the runs, to be changed."""
    return Path(shutil.copytree(project.runs, tmp_path / "runs"))


def test_a_missing_artifact_is_refused_with_the_command_that_makes_it(
    runs: Path, project: Project, tmp_path: Path
) -> None:
    (runs / "tiny_b" / "fold_1" / "model.onnx").unlink()
    with pytest.raises(UserError, match="fold_1 has no such artifact; run `python -m export --con"):
        project.bundle(tmp_path / "b", runs=runs)
    with pytest.raises(UserError, match=r"no such artifact.*--precision int8"):
        project.bundle(tmp_path / "b", precision=("int8",))


def test_a_precision_that_one_fold_lacks_is_refused(
    runs: Path, project: Project, tmp_path: Path
) -> None:
    """As after an export of which one artifact has failed the parity check."""
    for fold in (0, 2):
        path = runs / "tiny" / f"fold_{fold}" / "model.onnx"
        low = path.with_name("model.fp16.onnx")
        shutil.copyfile(path, low)
        manifest = {**read_json(manifest_path(path)), "precision": "fp16", "artifact": low.name}
        write_json(manifest_path(low), manifest)
    settings = {"runs": runs, "precision": ("fp32", "fp16")}
    with pytest.raises(UserError, match=r"fold_1 has no such artifact|not every fold .* in fp16"):
        project.bundle(tmp_path / "b", "one", **settings)
    # Not named, so those that are there are enough.
    assert project.bundle(tmp_path / "b", "one", runs=runs)


def test_an_artifact_of_other_weights_is_refused(
    runs: Path, project: Project, tmp_path: Path
) -> None:
    path = runs / "tiny" / "fold_2" / "model.onnx.json"
    manifest = read_json(path)
    manifest["made_from"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="of other weights than those that the ensemble was fitted"):
        project.bundle(tmp_path / "b", runs=runs)
    assert not (tmp_path / "b").exists()


def test_a_damaged_artifact_is_refused(runs: Path, project: Project, tmp_path: Path) -> None:
    path = runs / "tiny" / "fold_2" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="does not match its manifest"):
        project.bundle(tmp_path / "b", runs=runs)


def test_an_existing_folder_is_not_replaced(project: Project, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "b").mkdir()
    flags = ("--ensemble", project.ensembles / "final", "--output_dir", tmp_path / "b")
    ended = cli("infer", "bundle", *flags)
    assert (ended.code, ended.err) == (
        2,
        f"error: {tmp_path / 'b'} exists already; choose another --output_dir\n",
    )


def test_a_bundle_of_fold_all_submits_by_the_boosters_on_all_rows(
    exported_all: Path, embedded: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    fit = ("--data", synth_dataset, "--embeddings", embedded, "--out", tmp_path, "--seeds", 1)
    for name, features in (("tables", "raw"), ("images", "multimodal")):
        flags = ("--features", features, "--name", name, "--num_rounds", 10, "--refit", "true")
        run_module("infer", "fit", *fit, *flags)
    made = tmp_path / "b"
    flags = ("--ensemble", tmp_path / "images", "--runs", exported_all.parent, "--rows", "all")
    ended = cli(
        *("infer", "bundle", *flags, "--out", made, "--packages", "false", "--test", "false")
    )
    assert ended.code == 0, ended.err
    assert [path.name for path in (made / "networks" / "tiny").iterdir()] == ["fold_all"]
    output = tmp_path / "submission.csv"
    assert submit(SubmitSettings(bundle=made, data=synth_dataset, output=output, strict=True)) == 0
    by_hand = tmp_path / "hand.csv"
    where = ("--model_dir", exported_all, "--data", synth_dataset, "--out", tmp_path)
    run_module("infer", "embed", "--config", "tiny", *where, "--fold", "all")
    flags = ("--ensemble", tmp_path / "images", "--embeddings", tmp_path / "tiny_all")
    run_module(
        *("infer", "predict", *flags, "--data", synth_dataset, "--rows", "all"),
        *("--output", by_hand),
    )
    assert output.read_bytes() == by_hand.read_bytes()
