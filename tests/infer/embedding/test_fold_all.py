"""`infer embed --fold all`: the test split by the network that was trained on every row."""

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.embedding.store import read_run, scan_embeddings
from infer.engines import load, manifest_spec
from isic.dataset import Dataset
from isic.layout import ALL, ALL_NUMBER
from isic.runtime.files import read_manifest
from tests.support.commands import Cli


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


@pytest.mark.parametrize("more", [["--split", "train"], ["--folds", "all"]])
def test_training_images_are_refused(
    more: list[object], flags: list[object], tmp_path: Path, cli: Cli
) -> None:
    ended = cli("infer", *flags, "--fold", ALL, *more)
    assert ended.code == 2
    assert "was trained on every training image, so it embeds the test split only" in ended.err
    assert ended.err.count("\n") == 1
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
