"""The synthetic dataset: its files, and when they are written again."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from isic import schema
from isic.dataset import Dataset
from isic.runtime.errors import UserError
from isic.runtime.files import read_json, write_json
from isic.settings import SynthSettings
from isic.synth import marginals
from isic.synth.dataset import FILES, MANIFEST, synthesize
from tests.support.commands import Cli
from tests.support.synthetic import crops_of, measured, synthetic_files


def test_tables(synth_dataset: Path) -> None:
    train = pl.read_csv(synth_dataset / "train-metadata.csv", infer_schema=False)
    test = pl.read_csv(synth_dataset / "test-metadata.csv", infer_schema=False)
    assert tuple(train.columns) == schema.TRAIN_ORDER
    assert len(train.columns) == 55
    assert tuple(test.columns) == tuple(c for c in schema.TRAIN_ORDER if c not in schema.TRAIN_ONLY)
    assert len(test.columns) == 44
    assert (len(train), len(test)) == (300, 30)
    assert not set(train["isic_id"]) & set(test["isic_id"])
    assert not set(train["patient_id"]) & set(test["patient_id"])


def test_submission_and_truth_go_with_the_test_table(synth_dataset: Path) -> None:
    test = Dataset(synth_dataset).metadata("test")
    sample = pl.read_csv(synth_dataset / "sample_submission.csv")
    truth = pl.read_csv(synth_dataset / "test-truth.csv")
    assert sample.columns == truth.columns == ["isic_id", "target"]
    assert test["isic_id"].equals(sample["isic_id"])
    assert test["isic_id"].equals(truth["isic_id"])
    assert truth["target"].sum() == 2


def test_only_the_test_split_has_the_unseen_attribution(synth_dataset: Path) -> None:
    dataset = Dataset(synth_dataset)
    assert marginals.UNSEEN in set(dataset.metadata("test")["attribution"])
    assert set(dataset.metadata("train")["attribution"]) == set(marginals.ATTRIBUTIONS)


@pytest.mark.parametrize("test_images", [1, 2, 9])
def test_a_test_split_of_a_few_rows(test_images: int, tmp_path: Path) -> None:
    assert synthesize(SynthSettings(output_dir=tmp_path, images=50, test_images=test_images))
    assert len(Dataset(tmp_path).metadata("test")) == test_images


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert synthesize(SynthSettings(output_dir=tmp_path / name, images=60, seed=3))
    assert synthetic_files(tmp_path / "one") == synthetic_files(tmp_path / "two")
    synthesize(SynthSettings(output_dir=tmp_path / "three", images=60, seed=4))
    other = synthetic_files(tmp_path / "three")
    assert all(
        other[name] != content for name, content in synthetic_files(tmp_path / "one").items()
    )


def test_a_second_run_does_nothing(synth_dataset: Path, cli: Cli) -> None:
    before = {name: (synth_dataset / name).stat().st_mtime_ns for name in FILES}
    ended = cli("isic", "synth", "--output_dir", synth_dataset, "--images", 300, "--seed", 1)
    assert ended.code == 0
    assert "nothing to do" in ended.out
    assert before == {name: (synth_dataset / name).stat().st_mtime_ns for name in FILES}


def test_a_killed_run_is_written_again(synth_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    arguments = ["--output_dir", str(out), "--images", "300", "--seed", "1"]
    process = subprocess.Popen([sys.executable, "-m", "isic", "synth", *arguments])
    while not (out / "train-metadata.csv").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert read_json(out / MANIFEST)["unfinished"]
    assert not (out / "train-image.hdf5").exists()
    assert synthesize(SynthSettings(output_dir=out, images=300, seed=1))
    assert synthetic_files(out) == synthetic_files(synth_dataset)
    assert not list(out.glob(".*.tmp"))


def test_an_unfinished_dataset_of_other_settings_is_replaced(tmp_path: Path) -> None:
    write_json(tmp_path / MANIFEST, {"unfinished": True, "spec": {}})
    (tmp_path / "train-metadata.csv").write_text("half")
    assert synthesize(SynthSettings(output_dir=tmp_path, images=60))
    assert len(Dataset(tmp_path).metadata("train")) == 60


def test_a_damaged_file_is_written_again(tmp_path: Path) -> None:
    settings = SynthSettings(output_dir=tmp_path, images=60)
    synthesize(settings)
    whole = synthetic_files(tmp_path)
    (tmp_path / "train-image.hdf5").write_bytes(whole["train-image.hdf5"][:-100])
    assert synthesize(settings)
    assert synthetic_files(tmp_path) == whole


def test_a_small_pool_is_used_again(tmp_path: Path) -> None:
    synthesize(SynthSettings(output_dir=tmp_path, images=400, pool=100, test_images=50))
    crops = {name: (jpeg, mask) for name, jpeg, mask in crops_of(tmp_path, "train")}
    assert len(crops) == 400
    assert 30 < len(set(crops.values())) <= 100
    table = Dataset(tmp_path).metadata("train")
    seen = np.array([measured(*crops[name]) for name in table["isic_id"]])
    for i, (column, least) in enumerate([("tbp_lv_L", 0.8), ("tbp_lv_A", 0.5)]):
        assert np.corrcoef(seen[:, i], table[column].to_numpy())[0, 1] > least


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "20"], "--images: input should be greater than or equal to 50, got '20'"),
        (["--images", "100", "--positives", "100"], "more than half"),
        (["--positives", "0"], "--positives"),
        (["--picture", "3"], 'unknown key "picture"'),
        (["--images", "many"], "--images"),
    ],
)
def test_bad_flags(flags: list[str], message: str, tmp_path: Path, cli: Cli) -> None:
    ended = cli("isic", "synth", "--output_dir", tmp_path / "out", *flags)
    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_data_is_not_changed(synth_dataset: Path, small_dataset: Path) -> None:
    with pytest.raises(UserError, match="synthetic dataset with other settings"):
        synthesize(SynthSettings(output_dir=synth_dataset, images=300, seed=2))
    before = (small_dataset / "train-metadata.csv").read_bytes()
    with pytest.raises(UserError, match="that is not synthetic"):
        synthesize(SynthSettings(output_dir=small_dataset, images=300))
    assert (small_dataset / "train-metadata.csv").read_bytes() == before
