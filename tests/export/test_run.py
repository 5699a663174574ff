"""`python -m export`: which artifacts it makes, keeps and refuses."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import h5py
import numpy as np
import onnx
import polars as pl
import pytest
import torch

from export.formats import ArtifactSpec, BuildInputs
from export.options import ExportSettings
from export.run import artifact_spec, calibration_sample, load_source, parity_sample, publish
from infer.engines import load
from isic.layout import BEST_CHECKPOINT
from isic.runtime.errors import UserError
from isic.runtime.files import manifest_path, read_json, read_manifest, sha256
from tests.support.commands import Cli, run_module
from tests.support.training import other_constants
from train.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported run that a test may break."""
    return shutil.copytree(exported, tmp_path / "tiny")


def test_an_engine_reproduces_its_checkpoints_outputs(exported: Path) -> None:
    checkpoint = exported / "fold_1" / BEST_CHECKPOINT
    settings = ExportSettings(config="tiny", model_dir=exported)
    source = load_source(checkpoint, sha256(checkpoint), 1, settings)
    images = np.random.default_rng(5).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)
    features, logits = load(exported / "fold_1" / "model.onnx", "cpu").run(images)
    with torch.inference_mode():
        want_features, want_logits = source.model(torch.from_numpy(images))
    np.testing.assert_allclose(features, want_features, atol=1e-4)
    np.testing.assert_allclose(logits, want_logits, atol=1e-4)


def test_a_network_keeps_the_constants_that_it_was_trained_with(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another timm may have other ones; the manifest has those of the checkpoint."""
    monkeypatch.setattr("train.model.pretrained_config", other_constants)
    checkpoint = exported / "fold_1" / BEST_CHECKPOINT
    settings = ExportSettings(config="tiny", model_dir=exported)
    source = load_source(checkpoint, sha256(checkpoint), 1, settings)
    assert source.model.spec == source.preprocess
    images = np.random.default_rng(5).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    features = load(exported / "fold_1" / "model.onnx", "cpu").run(images)[0]
    with torch.inference_mode():
        found = source.model(torch.from_numpy(images))[0]
    np.testing.assert_allclose(found, features, atol=1e-4)


def test_the_manifest_ties_the_artifact_to_its_checkpoint(exported: Path) -> None:
    for fold in range(3):
        manifest = read_manifest(exported / f"fold_{fold}" / "model.onnx")
        assert (manifest["name"], manifest["fold"], manifest["format"]) == ("tiny", fold, "onnx")
        assert manifest["made_from"]["sha256"] == sha256(
            exported / f"fold_{fold}" / BEST_CHECKPOINT
        )
        parity = manifest["parity"]
        assert [name for name in parity if name.startswith("batch_")] == [
            "batch_1",
            "batch_2",
            "batch_8",
            "batch_16",
        ]
        assert all(parity[f"batch_{size}"]["cosine"] >= 0.99999 for size in (1, 2, 8, 16))
        assert parity["rank_correlation"] > 0.9999
        assert abs(parity["pauc_change"]) < 1e-3


@pytest.mark.slow
def test_a_current_artifact_is_kept_and_a_stale_one_is_made_again(run: Path, cli: Cli) -> None:
    ended = cli("export", "--config", "tiny", "--model_dir", run, "--fold", 0)
    assert ended.code == 0
    assert "up to date" in ended.out
    checkpoint = load_checkpoint(run / "fold_0" / BEST_CHECKPOINT)
    checkpoint["model_state_dict"]["head.1.bias"] += 1
    save_checkpoint(run / "fold_0" / BEST_CHECKPOINT, **checkpoint)
    before = sha256(run / "fold_0" / "model.onnx")
    ended = cli("export", "--config", "tiny", "--model_dir", run, "--fold", 0)
    assert ended.code == 0
    assert "up to date" not in ended.out
    assert sha256(run / "fold_0" / "model.onnx") != before


@pytest.mark.slow
def test_views_are_exported_into_an_artifact_of_their_own(
    run: Path, cli: Cli, tmp_path: Path
) -> None:
    command = ("export", "--config", "tiny", "--model_dir", run, "--fold", 0)
    triton = tmp_path / "triton"
    ended = cli(*command, "--tta", "d4", "--triton", triton)
    assert ended.code == 0, ended.err
    assert "exporting tiny: fold 0, onnx fp32 for the CPU, the mean over 8 views" in ended.out
    assert names(run / "fold_0") == {"model.onnx", "model.d4.onnx"}
    manifests = {name: run / "fold_0" / f"{name}.json" for name in names(run / "fold_0")}
    assert read_manifest(run / "fold_0" / "model.onnx")["tta"] == "none"
    assert read_manifest(run / "fold_0" / "model.d4.onnx")["tta"] == "d4"
    text = (triton / "tiny_fold_0" / "config.pbtxt").read_text()
    assert "max_batch_size: 32\n" in text, "eight times as many images are in the network"
    assert 'key: "tta"' in text
    assert cli(*command, "--tta", "d4").out.count("up to date") == 1
    # An artifact of an earlier version has no views, and one with other views is stale.
    for name, tta in (("model.onnx", "none"), ("model.d4.onnx", "d4")):
        fields = json.loads(manifests[name].read_text())
        del fields["tta"]
        manifests[name].write_text(json.dumps(fields))
        is_kept = "up to date" in cli(*command, "--tta", tta).out
        assert is_kept == (tta == "none")


@pytest.mark.slow
def test_a_failed_parity_check_leaves_no_artifact_and_exits_1(
    run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import onnx_graph

    real_build = onnx_graph.build

    def corrupted(spec: ArtifactSpec, inputs: BuildInputs, path: Path) -> dict[str, Any]:
        facts = real_build(spec, inputs, path)
        graph = onnx.load(path)
        weight = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        values = onnx.numpy_helper.to_array(weight).copy()
        values.flat[0] += 10  # one weight of one matrix
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(graph, path)
        return facts

    monkeypatch.setattr(onnx_graph, "build", corrupted)
    ended = cli("export", "--config", "tiny", "--model_dir", run, "--fold", 0, "--force")
    assert ended.code == 1
    assert "failed the parity check" in ended.out
    assert not (run / "fold_0" / "model.onnx").exists()
    assert json.loads((run / "fold_0" / "parity.json").read_text())["model.onnx"]["passed"] is False
    assert not list((run / "fold_0").glob(".candidate*"))


@pytest.mark.parametrize("step", ["remember", "record_parity"])
def test_an_export_that_is_killed_before_its_last_file_is_not_up_to_date(
    step: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = run / "fold_0" / "model.onnx"
    manifest = read_manifest(artifact)
    manifest_path(artifact).unlink()
    monkeypatch.setattr(f"export.run.{step}", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        publish(artifact, manifest, manifest["parity"])
    assert not manifest_path(artifact).exists()


def test_a_checked_artifact_is_not_digested_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = run / "fold_0" / "model.onnx"
    manifest = read_manifest(artifact)
    monkeypatch.setattr("isic.runtime.files.file_sha256", Mock(side_effect=AssertionError))
    publish(artifact, {**manifest, "artifact": "former.onnx"}, manifest["parity"])
    assert list(read_json(manifest_path(artifact)).items()) == list(manifest.items())


@pytest.mark.slow
def test_bad_input_is_refused(run: Path, cli: Cli, tmp_path: Path) -> None:
    for flags, words in (
        (["--config", "other", "--model_dir", run], "is fold 0 of tiny, not fold 0 of other"),
        (
            ["--config", "tiny", "--model_dir", tmp_path / "none"],
            "run `python -m train --config tiny` first",
        ),
        (["--config", "tiny", "--model_dir", run, "--fold", 7], "has no fold_7"),
        (
            ["--config", "tiny", "--model_dir", run, "--force", "--data", tmp_path / "none"],
            "no such folder",
        ),
    ):
        ended = cli("export", *flags)
        assert ended.code == 2
        assert words in ended.err
        assert ended.err.count("\n") == 1


def test_a_checkpoint_in_another_folds_folder_is_refused(run: Path, cli: Cli) -> None:
    shutil.copy(run / "fold_1" / BEST_CHECKPOINT, run / "fold_0" / BEST_CHECKPOINT)
    ended = cli("export", "--config", "tiny", "--model_dir", run, "--fold", 0)
    assert ended.code == 2
    assert "is fold 1 of tiny, not fold 0" in ended.err


@pytest.mark.slow
def test_a_checkpoint_is_read_once_per_fold_and_not_at_all_if_all_is_up_to_date(
    run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def counted(path: Path) -> dict[str, Any]:
        reads.append(path.parent.name)
        return load_checkpoint(path)

    monkeypatch.setattr("export.run.load_checkpoint", counted)
    command = ("export", "--config", "tiny", "--model_dir", run)
    assert cli(*command).out.count("up to date") == 3
    assert reads == []
    both = cli(*command, "--precision", "fp32,fp16", "--fold", 1)
    assert both.code == 0
    assert both.out.count("up to date") == 1
    assert reads == ["fold_1"]
    assert cli(*command, "--precision", "fp32,fp16", "--fold", 1, "--force").code == 0
    assert reads == ["fold_1", "fold_1"]


@pytest.mark.parametrize("flag", ["--formats", "--format", "--engine"])
def test_the_format_may_be_asked_for_by_other_words(flag: str, run: Path, cli: Cli) -> None:
    ended = cli("export", "--config", "tiny", "--model_dir", run, flag, "onnx")
    assert ended.code == 0
    assert ended.out.count("up to date") == 3
    ended = cli("export", "--config", "tiny", "--model_dir", run, flag, "onxx")
    assert 'no format "onxx", did you mean "onnx"' in ended.err


def test_the_help_shows_one_word_for_the_format(cli: Cli) -> None:
    words = cli("export", "--help").out.split()
    assert words.count("--formats") == 1
    assert not {"--format", "--engine"} & set(words)


FORMATS_FLAGS = (
    "--formats",
    "onnx,aoti,tensorrt_rtx",
    "--precision",
    "fp16",
    "--max_batch",
    16,
    "--opt_batch",
    8,
)


@pytest.fixture(scope="module")
def formats_run(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(exported, tmp_path_factory.mktemp("formats") / "tiny")


@pytest.fixture(scope="module")
def first(formats_run: Path) -> Path:
    """The folder of a fold with artifacts in many formats."""
    run_module(
        "export", "--config", "tiny", "--model_dir", formats_run, "--fold", 0, *FORMATS_FLAGS
    )
    return formats_run / "fold_0"


def names(folder: Path) -> set[str]:
    """Return the exported artifacts that have a manifest."""
    manifests = [json.loads(path.read_text()) for path in folder.glob("*.*.json")]
    return {manifest["artifact"] for manifest in manifests if "format" in manifest}


@pytest.mark.slow
def test_one_command_makes_them_all(first: Path) -> None:
    made = names(first)
    package, plan = (
        next(name for name in made if name.endswith(suffix)) for suffix in (".pt2", ".plan")
    )
    assert made == {"model.onnx", "model.fp16.onnx", package, plan}
    results = json.loads((first / "parity.json").read_text())
    assert all(result["passed"] for result in results.values())
    assert set(results) == made - {plan}, "no GPU has run the plan"
    assert read_manifest(first / plan)["batch_size"] == 8, "one call for each batch"
    assert "batch_size" not in read_manifest(first / package), "it is for a CPU"
    images = np.random.default_rng(3).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    exact, *others = (
        load(first / name).run(images)[0] for name in ("model.onnx", "model.fp16.onnx", package)
    )
    assert all(0 < np.abs(exact - other).max() < 0.05 for other in others)


@pytest.mark.slow
def test_a_current_artifact_is_kept_until_an_option_changes(
    formats_run: Path, first: Path, cli: Cli
) -> None:
    base = (
        "export",
        "--config",
        "tiny",
        "--model_dir",
        formats_run,
        "--fold",
        0,
        "--formats",
        "onnx,tensorrt_rtx",
    )
    base = (*base, "--precision", "fp16")
    assert cli(*base, "--max_batch", 16, "--opt_batch", 8).out.count("up to date") == 2
    ended = cli(*base, "--max_batch", 32, "--opt_batch", 8)
    assert ended.code == 0
    assert ended.out.count("up to date") == 1, "an ONNX file does not depend on the batch profile"
    assert "not checked" in ended.out


@pytest.mark.slow
def test_a_plan_that_no_gpu_has_run_is_not_used(first: Path) -> None:
    plan = next(first.glob("*.plan"))
    assert read_manifest(plan)["parity"] is None
    with pytest.raises(UserError, match="has not passed the parity check"):
        load(plan)


@pytest.mark.slow
def test_a_package_for_another_machine_is_not_loaded(first: Path, tmp_path: Path) -> None:
    package = next(first.glob("*.pt2"))
    manifest = json.loads((first / f"{package.name}.json").read_text())
    copy = Path(shutil.copy(package, tmp_path))
    (tmp_path / f"{package.name}.json").write_text(
        json.dumps({**manifest, "architecture": "cpu-sparc"})
    )
    with pytest.raises(
        UserError, match=r"was compiled for cpu-sparc, this is cpu-.*--formats aoti --device cpu"
    ):
        load(copy)
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        load(package, "cuda")


@pytest.mark.slow
def test_embed_takes_the_engine_that_is_named(
    formats_run: Path,
    first: Path,
    synth_dataset: Path,
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = (
        "infer",
        "embed",
        "--config",
        "tiny",
        "--model_dir",
        formats_run,
        "--data",
        synth_dataset,
        "--split",
        "test",
    )
    base = (*base, "--output_dir", tmp_path)
    ended = cli(*base, "--engine", "onnx")
    assert ended.code == 2
    assert "has model.fp16.onnx, model.onnx; choose with --precision" in ended.err
    ended = cli(*base, "--engine", "onnx", "--precision", "int8")
    assert ended.code == 2
    assert "no fold_<k> with onnx in int8 for these flags, only onnx fp16, onnx fp32; " in ended.err
    ended = cli(*base, "--engine", "tensorrt_rtx")
    assert ended.code == 2
    assert "has not passed the parity check" in ended.err
    assert cli(*base, "--engine", "aoti").code == 0
    assert (tmp_path / "tiny" / "test" / "run.json").is_file()
    # Another user has exported none of it.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    ended = cli(*base, "--engine", "aoti")
    assert ended.code == 2
    assert ".pt2 is native code for AOTInductor that you have not exported" in ended.err
    assert cli(*base, "--engine", "aoti", "--trust", "true").code == 0
    assert cli(*base, "--engine", "aoti").code == 0


@pytest.mark.slow
def test_check_compares_existing_artifacts(formats_run: Path, first: Path, cli: Cli) -> None:
    base = ("export", "--config", "tiny", "--model_dir", formats_run, "--fold", 0, "--check")
    before = read_manifest(first / "model.onnx")
    assert cli(*base).code == 0
    after = read_manifest(first / "model.onnx")
    assert after["parity"].keys() == before["parity"].keys()
    assert after["made_from"] == before["made_from"]
    ended = cli(*base, "--fold", 1, "--precision", "fp16")
    assert ended.code == 2
    assert "no such file" in ended.err


RTX = "tensorrt_rtx"
RTX_FLAGS = ("--formats", RTX, "--max_batch", 8, "--opt_batch", 4)


@pytest.mark.slow
def test_one_command_calibrates_on_training_images_and_records_it(
    trained: Path, tmp_path: Path, cli: Cli
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    run = shutil.copytree(trained, tmp_path / "tiny")
    base = (
        "export",
        "--config",
        "tiny",
        "--model_dir",
        run,
        "--fold",
        0,
        *RTX_FLAGS,
        "--calibration_images",
        24,
    )
    ended = cli(*base, "--precision", "fp8")
    assert ended.code == 0
    assert ended.out.count("not checked") == 1
    (plan,) = run.glob("fold_0/*.plan")
    checkpoint = run / "fold_0" / BEST_CHECKPOINT
    settings = ExportSettings(config="tiny", model_dir=run)
    source = load_source(checkpoint, sha256(checkpoint), 0, settings)
    calibrated = calibration_sample(source, 24)
    manifest = read_manifest(plan)
    digest = hashlib.sha256(calibrated.tobytes()).hexdigest()
    assert manifest["calibration"] == {"images": 24, "sha256": digest, "layers": 24}
    assert manifest["plan"]["layers"]["matrix_multiply"]["float8"] == 24
    assert manifest["options"]["calibration_images"] == 24
    held_out = {image.tobytes() for image in parity_sample(source)[0]}
    assert not held_out & {image.tobytes() for image in calibrated}, (
        "calibration sees no image of the parity check"
    )
    assert cli(*base, "--precision", "fp8").out.count("up to date") == 1
    fewer = ExportSettings(config="tiny", calibration_images=23)
    stale, calm = (
        artifact_spec(0, RTX, precision, fewer).facts["options"] for precision in ("fp8", "fp16")
    )
    assert stale["calibration_images"] == 23
    assert "calibration_images" not in calm, "float16 is not calibrated"


@pytest.mark.slow
def test_a_dataset_without_training_images_is_refused(
    trained: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    """The images of the parity check exist, and those of the calibration do not."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(synth_dataset / "train-metadata.csv", data)
    held_out = set(
        pl.read_parquet(trained / "folds.parquet").filter(pl.col("fold") == 0)["isic_id"]
    )
    with (
        h5py.File(synth_dataset / "train-image.hdf5") as old,
        h5py.File(data / "train-image.hdf5", "w") as new,
    ):
        for name in held_out:
            new.create_dataset(name, data=old[name][()])
    run = shutil.copytree(trained, tmp_path / "tiny")
    command = ("export", "--config", "tiny", "--model_dir", run)
    ended = cli(*command, "--fold", 0, *RTX_FLAGS, "--precision", "fp8", "--data", data)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "fp8 needs images to calibrate on, and there are none; give --data" in ended.err
    assert not list(run.glob("fold_0/*.plan"))
    ended = cli("export", "--config", "tiny", "--model_dir", run, "--precision", "fp8")
    assert ended.code == 2
    assert "onnx on cpu offers fp32, fp16, int8" in ended.err
