"""`infer embed --fold all`: the test split by the network that was trained on every row."""

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.embedding.store import IMAGES, read_run, scan_embeddings
from infer.engines import load, manifest_spec
from infer.ensemble.blends.artifact import open_scorer
from infer.ensemble.predict import predict_submission
from infer.ensemble.settings import PredictSettings
from infer.submission.networks import needs_of
from isic.dataset import Dataset
from isic.layout import ALL, ALL_NUMBER
from isic.runtime.files import read_json, read_manifest
from tests.support.commands import Cli
from tests.support.datasets import jpeg, write_hdf5
from tests.support.ensembles import fit_small


@pytest.fixture
def flags(exported_all: Path, synth_dataset: Path, tmp_path: Path) -> list[object]:
    where = ["--model_dir", exported_all, "--data", synth_dataset]
    return ["embed", "--config", "tiny", *where, "--output_dir", tmp_path / "out"]


def test_each_test_image_is_embedded_once(
    embedded_all: Path, exported_all: Path, synth_dataset: Path
) -> None:
    assert [path.name for path in embedded_all.iterdir()] == ["test"]
    assert (embedded_all / "test" / "fold_all" / "part-00000.parquet").is_file()
    rows = scan_embeddings(embedded_all, "test").collect()
    dataset = Dataset(synth_dataset)
    assert rows["isic_id"].to_list() == dataset.metadata("test")["isic_id"].to_list()
    assert rows.schema["fold"] == pl.Int8
    assert rows["fold"].unique().to_list() == [ALL_NUMBER] == [-1]

    artifact = exported_all / "fold_all" / "model.onnx"
    run = read_run(embedded_all, "test")
    assert run["config"] == "tiny"
    assert run["folds"] == [ALL]
    assert run["engines"] == {ALL: read_manifest(artifact)["sha256"]}
    engine = load(artifact, "cpu")
    images, failed = dataset.images("test").load(
        rows["isic_id"].to_list(), manifest_spec(read_manifest(artifact))
    )
    assert not failed
    np.testing.assert_allclose(rows["logit"], engine.run(images)[1][:, 0], atol=1e-4)


def test_without_the_flag_numbered_folds_embed(
    flags: list[object], tmp_path: Path, cli: Cli
) -> None:
    ended = cli("infer", *flags, "--split", "test")
    assert ended.code == 0, ended.err
    assert "note:" not in ended.out
    assert read_run(tmp_path / "out" / "tiny", "test")["folds"] == [0, 1, 2]


def test_a_second_run_does_nothing(flags: list[object], tmp_path: Path, cli: Cli) -> None:
    assert cli("infer", *flags, "--fold", ALL).code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tiny_all"]
    again = cli("infer", *flags, "--fold", ALL, "--split", "test")
    assert (again.code, "up to date" in again.out) == (0, True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split", "train"], "learned from 300 of the 300 training rows"),
        (["--folds", "all"], "--folds chooses among numbered folds"),
    ],
)
def test_its_own_training_images_are_refused(
    more: list[object], message: str, flags: list[object], tmp_path: Path, cli: Cli
) -> None:
    ended = cli("infer", *flags, "--fold", ALL, *more)
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def write_other_lesions(data: Path, root: Path, patient: str) -> Path:
    """Write a dataset whose training rows have other ids and images than a given one's."""
    root.mkdir()
    for name in ("test-metadata.csv", "test-image.hdf5"):
        shutil.copy(data / name, root)
    rows = Dataset(data).metadata("train")
    other = rows.with_columns(
        isic_id="OTHER" + pl.col("isic_id"), patient_id=patient + pl.col("patient_id")
    )
    other.write_csv(root / "train-metadata.csv")
    write_hdf5(root / "train-image.hdf5", dict.fromkeys(other["isic_id"], jpeg()))
    return root


def test_training_images_of_another_dataset_are_embedded_as_by_a_frozen_network(
    flags: list[object], synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags[flags.index("--data") + 1] = write_other_lesions(synth_dataset, tmp_path / "a", "other")
    ended = cli("infer", *flags, "--fold", ALL, "--split", "train")
    assert ended.code == 0, ended.err
    run = tmp_path / "out" / "tiny_all"
    assert sorted(path.name for path in run.iterdir()) == ["train"]
    assert len(scan_embeddings(run, "train").collect()) == 300
    chosen = {"features": "sex,frozen_score", "frozen": run, "num_rounds": 2}
    fitted = fit_small(tmp_path / "a", tmp_path / "ensemble", **chosen)
    assert read_json(fitted / "ensemble.json")["frozen"]["tiny"]["fold"] == ALL
    assert [[*need.checkpoints] for need in needs_of(open_scorer(fitted), "folds")] == [[ALL]]
    ended = cli("infer", *flags, "--fold", ALL)
    assert ended.code == 0, ended.err
    where = {"data": tmp_path / "a", "output": tmp_path / "s.csv"}
    predict_submission(PredictSettings(ensemble=fitted, frozen=run, **where))
    assert pl.read_csv(tmp_path / "s.csv")["target"].n_unique() > 1


def test_training_images_of_its_own_patients_are_refused(
    flags: list[object], synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags[flags.index("--data") + 1] = write_other_lesions(synth_dataset, tmp_path / "a", "")
    ended = cli("infer", *flags, "--fold", ALL, "--split", "train")
    assert ended.code == 2
    assert "or from their patients" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_run_without_it_names_the_command(
    flags: list[object], exported: Path, tmp_path: Path, cli: Cli
) -> None:
    flags[4] = exported
    ended = cli("infer", *flags, "--fold", ALL)
    assert ended.code == 2
    assert "has no fold_all with an exported model" in ended.err
    assert "`python -m export --config tiny --fold all`" in ended.err
    named = cli("infer", *flags, "--fold", ALL, "--format", "model.onnx")
    assert "has no fold_all with model.onnx" in named.err


def test_several_processes_embed_it(flags: list[object], tmp_path: Path, cli: Cli) -> None:
    ended = cli("infer", *flags, "--fold", ALL, "--num_processes", 2)
    assert ended.code == 0, ended.err
    assert read_run(tmp_path / "out" / "tiny_all", "test")["folds"] == [ALL]


def test_the_note_on_a_fold_without_an_artifact_names_its_command(
    flags: list[object], exported_all: Path, tmp_path: Path, cli: Cli
) -> None:
    run = shutil.copytree(exported_all, tmp_path / "tiny")
    (run / "fold_1" / "model.onnx").unlink()
    (run / "fold_1" / "model.onnx.json").unlink()
    flags[4] = run
    ended = cli("infer", *flags)
    assert ended.code == 0, ended.err
    assert "note: fold_1 in" in ended.out
    assert "`python -m export --config tiny --formats onnx --precision fp32` makes it" in ended.out


def test_any_images_are_embedded_by_fold_all_too(
    exported_all: Path, tmp_path: Path, cli: Cli
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(jpeg(40))
    folders = ["--model_dir", exported_all, "--images", photos, "--output_dir", tmp_path / "out"]
    ended = cli("infer", "embed", "--config", "tiny", "--fold", "all", *folders)
    assert ended.code == 0, ended.err
    found = scan_embeddings(tmp_path / "out" / "tiny_all", IMAGES).collect()
    assert found.select("isic_id", "fold").rows() == [("a.jpg", ALL_NUMBER)]
