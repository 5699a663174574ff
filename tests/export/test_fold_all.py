"""`export --fold all`: the artifact of the network that was trained on every row."""

import shutil
from pathlib import Path

import pytest

from export.options import ExportSettings
from export.run import calibration_sample, load_source, parity_sample
from isic.folds import read_folds
from isic.layout import ALL, BEST_CHECKPOINT, FOLDS_FILE
from isic.runtime.files import read_manifest, sha256
from tests.support.commands import Cli


def test_its_artifact_passes_parity_on_training_images(exported_all: Path) -> None:
    manifest = read_manifest(exported_all / "fold_all" / "model.onnx")
    assert manifest["fold"] == ALL
    assert manifest["parity"]["images"] == "training"
    assert manifest["parity"]["rank_correlation"] > 0.9999
    assert manifest["folds_digest"] == read_folds(exported_all / FOLDS_FILE).digest
    numbered = read_manifest(exported_all / "fold_0" / "model.onnx")
    assert numbered["parity"]["images"] == "held out"


def test_the_table_names_the_images_of_the_parity_check(exported_all: Path, cli: Cli) -> None:
    flags = ["--config", "tiny", "--model_dir", exported_all, "--check"]
    ended = cli("export", *flags, "--fold", ALL)
    assert ended.code == 0, ended.err
    assert "parity on training images, because fold all holds none out" in ended.out
    assert " all onnx " in ended.out
    assert "training images" not in cli("export", *flags, "--fold", 0).out


def test_numbered_folds_are_exported_without_the_flag(
    exported_all: Path, tmp_path: Path, cli: Cli
) -> None:
    run = shutil.copytree(exported_all, tmp_path / "tiny")
    (run / "fold_all" / "model.onnx").unlink()
    ended = cli("export", "--config", "tiny", "--model_dir", run)
    assert ended.code == 0, ended.err
    assert "folds 0, 1, 2," in ended.out
    assert not (run / "fold_all" / "model.onnx").exists()


def test_a_run_without_it_names_the_command_that_trains_it(exported: Path, cli: Cli) -> None:
    ended = cli("export", "--config", "tiny", "--model_dir", exported, "--fold", ALL)
    assert ended.code == 2
    assert "has no fold_all with best_model.pth" in ended.err
    assert "`python -m train --config tiny --fold all`" in ended.err


@pytest.mark.parametrize("fold", [ALL, 1])
def test_parity_and_calibration_share_no_image(fold: str | int, exported_all: Path) -> None:
    checkpoint = exported_all / f"fold_{fold}" / BEST_CHECKPOINT
    settings = ExportSettings(config="tiny", model_dir=exported_all, parity_images=999)
    source = load_source(checkpoint, sha256(checkpoint), fold, settings)
    judged, labels = parity_sample(source)
    calibration = calibration_sample(source, 999)
    assert 0 < labels.sum() < len(labels)
    shared = {image.tobytes() for image in judged} & {image.tobytes() for image in calibration}
    assert not shared
    assert len(judged) + len(calibration) == 300


def test_triton_serves_it_by_its_name(exported_all: Path, tmp_path: Path, cli: Cli) -> None:
    flags = ["--config", "tiny", "--model_dir", exported_all, "--fold", ALL]
    ended = cli("export", *flags, "--triton", tmp_path / "models")
    assert ended.code == 0, ended.err
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny_fold_all"]
