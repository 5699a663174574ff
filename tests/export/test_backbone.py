"""`python -m export --model`: a backbone without training, its embeddings, and its provenance."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import polars as pl
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file

from export.backbone import (
    OpenBackbone,
    describe_backbone,
    find_classifier,
    open_backbone,
    refuse_other_content,
    synthetic_sample,
)
from export.formats import TOLERANCES
from export.options import ExportSettings
from export.parity import ParityError, check_figure, compare
from infer import load_embedder, occlusion_map
from infer.engines import load
from infer.ensemble.images.features import FROZEN_FORMS
from isic.preprocess import PreprocessSpec
from isic.provenance import read_seen
from isic.runtime.errors import UserError
from isic.runtime.files import read_manifest, sha256
from tests.support.commands import Cli, run_module, tiny_settings
from tests.support.datasets import jpeg
from tests.support.training import random_batch
from train import pretrained
from train.backbone import timm_config
from train.config import TrainSettings
from train.model import create_model

MODEL = "test_vit"
SIZE = 32
FEW = ("--parity_images", 9)

FAMILIES = {
    "mobilenetv3_small_050": 32,
    "test_byobnet": 32,
    "test_convnext": 32,
    "test_convnext3": 32,
    "test_efficientnet": 32,
    "test_mambaout": 32,
    "test_nfnet": 64,
    "test_resnet": 32,
    "test_vit3": 32,
    "test_vit_relpos": 32,
}
"""A small model of ten families, and an image size at which it takes little time."""


def random_weights(path: Path, model: str = MODEL, **options: object) -> Path:
    """Write the weights of a model from a fixed seed, with its classifier unless options differ."""
    torch.manual_seed(3)
    save_file(timm.create_model(model, **options).state_dict(), path)
    return path


def artifact_of(run: Path) -> Path:
    return run / "fold_none" / "model.onnx"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("weights") / "wild.safetensors")


@pytest.fixture(scope="module")
def run(weights: Path) -> Path:
    """The exported backbone."""
    run = weights.parent / "wild"
    flags = ("--model", MODEL, "--pretrained", weights, "--image_size", SIZE, *FEW)
    run_module("export", *flags, "--name", "wild", "--model_dir", run)
    return run


@pytest.fixture(scope="module")
def embedded(run: Path, synth_dataset: Path) -> Path:
    output = run.parent / "embeddings"
    where = ("--model_dir", run, "--data", synth_dataset, "--output_dir", output)
    run_module("infer", "embed", "--config", "wild", *where)
    return output / "wild"


def test_features_and_class_logits_are_those_of_timm(run: Path, weights: Path) -> None:
    path = artifact_of(run)
    whole = timm.create_model(
        MODEL, img_size=SIZE, pretrained_cfg_overlay={"file": str(weights)}, pretrained=True
    ).eval()
    images = np.random.default_rng(5).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    config = whole.pretrained_cfg
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    maps = (scaled - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(
        3, 1, 1
    )
    with torch.inference_mode():
        expected = whole(maps)
        features = whole.forward_head(whole.forward_features(maps), pre_logits=True)
    engine = load(path, "cpu")
    (found,) = engine.run(images)
    np.testing.assert_allclose(found, features, atol=1e-4)
    np.testing.assert_allclose(engine.run_other(images, "class_logits"), expected, atol=1e-4)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["features", "class_logits"]


def test_the_manifest_names_the_weights_and_what_they_have_seen(run: Path, weights: Path) -> None:
    folder = run / "fold_none"
    manifest = read_manifest(artifact_of(run))
    assert (manifest["name"], manifest["fold"], manifest["model"]) == ("wild", "none", MODEL)
    assert manifest["pretrained"]["source"] == str(weights)
    assert manifest["pretrained"]["sha256"] == sha256(weights)
    assert manifest["trained_on"] == sha256(folder / "trained_on.parquet")
    assert read_seen(folder / "trained_on.parquet").is_empty()
    assert manifest["preprocess"] == {
        "size": SIZE,
        "interpolation": "cubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "color_order": "RGB",
    }
    assert manifest["num_classes"] == 1000
    assert manifest["parity"]["images"] == "synthetic"
    assert "rank_correlation" not in manifest["parity"]
    assert manifest["parity"]["batch_8"]["max_class_error"] < 1e-3


def test_train_and_test_images_have_features_of_one_engine_and_no_logit(
    embedded: Path, run: Path, synth_dataset: Path, cli: Cli
) -> None:
    for split in ("train", "test"):
        (part,) = (embedded / split / "fold_none").glob("part-*")
        table = pl.read_parquet(part)
        assert table.columns == ["isic_id", "features"]
        written = json.loads((embedded / split / "run.json").read_text())
        assert (written["folds"], written["folds_digest"]) == (["none"], None)
        assert written["pretrained"]["none"] == read_manifest(artifact_of(run))["pretrained"]
        assert (
            len(table)
            == written["num_images"]
            == len(pl.read_csv(synth_dataset / f"{split}-metadata.csv", infer_schema=False))
        )
    assert not (embedded / "folds.parquet").exists()
    assert read_seen(embedded / "train" / "fold_none" / "trained_on.parquet").is_empty()
    where = ("--model_dir", run, "--data", synth_dataset, "--output_dir", embedded.parent)
    ended = cli("infer", "embed", "--config", "wild", *where)
    assert ended.out.count("up to date") == 2


def test_any_images_are_embedded_too(run: Path, tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(jpeg(40, seed=number))
    where = ("--model_dir", run, "--output_dir", tmp_path / "out")
    ended = cli("infer", "embed", "--config", "wild", "--images", folder, *where)
    assert ended.code == 0, ended.err
    (part,) = (tmp_path / "out" / "wild" / "images" / "fold_none").glob("part-*")
    assert pl.read_parquet(part).shape == (3, 2)


def test_python_calls_give_features_and_refuse_logits(run: Path) -> None:
    images = list(np.random.default_rng(2).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8))
    with load_embedder(run) as embedder:
        assert embedder.name == "wild"
        found = embedder.embed(images)
        assert len(found) == 3
        assert found.features.shape == (3, embedder.num_features)
        with pytest.raises(UserError, match="wild is a backbone without a lesion head"):
            found.logits  # noqa: B018
        with pytest.raises(UserError, match="has no logit to explain"):
            occlusion_map(embedder, images)


@pytest.mark.slow
def test_a_backbone_is_a_frozen_network_and_no_other(
    run: Path, embedded: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    where = ("--data", synth_dataset, "--output_dir", tmp_path, "--num_rounds", 5, "--seeds", 1)
    for features, flag in (
        ("image", "embeddings"),
        ("aligned", "embeddings"),
        ("frozen_score", "frozen"),
    ):
        ended = cli("infer", "fit", "--features", features, f"--{flag}", embedded, *where)
        assert ended.code == 2
        assert "has features, but neither a score nor folds" in ended.err
    words = ",".join(["raw", *FROZEN_FORMS]).replace(",frozen_score", "")
    flags = ("--features", words, "--frozen", embedded, "--name", "both")
    ended = cli("infer", "fit", *flags, *where)
    assert ended.code == 0, ended.err
    output = tmp_path / "submission.csv"
    flags = ("--ensemble", tmp_path / "both", "--frozen", embedded, "--output", output)
    ended = cli("infer", "predict", "--data", synth_dataset, *flags)
    assert ended.code == 0, ended.err
    weights = json.loads((embedded / "train" / "run.json").read_text())["pretrained"]["none"]
    for manifest in (tmp_path / "both" / "ensemble.json", tmp_path / "submission.csv.json"):
        frozen = json.loads(manifest.read_text())["frozen"]["wild"]
        assert frozen["made_with"]["pretrained"] == weights
    report = (tmp_path / "both" / "report.html").read_text()
    assert f"wild: {weights['source']} (sha256 {weights['sha256']})" in report
    ended = cli("infer", "fit", "--features", "raw", *where)
    assert ended.code == 0, ended.err
    flags = ("--ensemble", tmp_path / "both", "--runs", run.parent, "--packages", False)
    ended = cli("infer", "bundle", *flags, "--test", False, "--output_dir", tmp_path / "bundle")
    assert ended.code == 0, ended.err
    flags = ("--bundle", tmp_path / "bundle", "--output", tmp_path / "offline.csv", "--strict")
    ended = cli("infer", "submit", "--data", synth_dataset, *flags)
    assert ended.code == 0, ended.err
    assert (tmp_path / "offline.csv").read_bytes() == output.read_bytes()


@pytest.mark.slow
def test_weights_of_a_run_bring_their_list_and_their_size(
    exported: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ("--model", MODEL, "--name", "again", "--model_dir", tmp_path / "again", *FEW)
    ended = cli("export", *flags, "--pretrained", exported)
    assert ended.code == 2
    assert "has no model.safetensors and no fold_all/backbone; give a backbone of it" in ended.err
    assert f"such as {exported / 'fold_0' / 'backbone'}" in ended.err
    assert not (tmp_path / "again").exists()
    ended = cli("export", *flags, "--pretrained", exported / "fold_0" / "backbone")
    assert ended.code == 0, ended.err
    manifest = read_manifest(artifact_of(tmp_path / "again"))
    assert manifest["preprocess"]["size"] == SIZE, "not the 160 pixels of timm's own weights"
    assert manifest["preprocess"]["interpolation"] == "linear"
    assert "num_classes" not in manifest
    seen = tmp_path / "again" / "fold_none" / "trained_on.parquet"
    assert sha256(seen) == sha256(exported / "fold_0" / "trained_on.parquet")
    assert manifest["trained_on"] == sha256(seen)


def hub_config(repository: Path, **changes: object) -> None:
    """Write a repository's config.json as timm does."""
    given = {"input_size": [3, 48, 48], "mean": [0.1] * 3, "std": [0.2] * 3}
    fields = {"architecture": MODEL, "pretrained_cfg": given, **changes}
    (repository / "config.json").write_text(json.dumps(fields))


def open_with(pretrained: object) -> OpenBackbone:
    flags = {"model": MODEL, "pretrained": str(pretrained)}
    return open_backbone(ExportSettings.model_validate(flags))


def test_weights_of_a_hub_bring_their_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No hub is reached."""
    random_weights(tmp_path / "model.safetensors")

    def download(repo_id: str, filename: str, revision: str | None, cache_dir: None = None) -> str:
        assert (repo_id, revision) == ("me/wild", "v1")
        path = tmp_path / filename
        if not path.is_file():
            raise EntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr("train.pretrained.hf_hub_download", download)
    pretrained.hub_file.cache_clear()
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    hub_config(tmp_path)
    on_hub, local = open_with("me/wild@v1"), open_with(tmp_path)
    assert on_hub.model.spec == local.model.spec
    assert (on_hub.model.spec.size, on_hub.model.spec.mean) == (48, (0.1, 0.1, 0.1))
    assert capsys.readouterr().err == ""

    flat = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    (tmp_path / "config.json").write_text(json.dumps({**flat, "pretrained_cfg": None}))
    assert open_with(tmp_path).model.spec == local.model.spec, "as earlier versions of timm wrote"

    (tmp_path / "config.json").unlink()
    pretrained.hub_file.cache_clear()
    assert open_with("me/wild@v1").model.spec.mean == (0.5, 0.5, 0.5)
    words = "no config.json with mean and std can be read from me/wild@v1; taking those of test_vit"
    assert f"{words}, (0.5, 0.5, 0.5) and (0.5, 0.5, 0.5)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"pretrained_cfg": {"mean": [0.5], "std": [0.2] * 3}}, "pretrained_cfg.mean"),
        ({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0, 1, 1]}}, "pretrained_cfg.std.0"),
        ({"pretrained_cfg": 5}, "pretrained_cfg"),
        ({"model_args": "max"}, "model_args"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(
    changes: dict[str, object], field: str, tmp_path: Path
) -> None:
    random_weights(tmp_path / "model.safetensors")
    hub_config(tmp_path, **changes)
    with pytest.raises(UserError, match=rf"config\.json is damaged \({field}: .*; correct it"):
        open_with(tmp_path)


def test_a_backbone_pools_as_it_was_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(global_pool="max")
    trained = create_model(settings).eval()
    save_file(trained.backbone.state_dict(), tmp_path / "model.safetensors")
    config = timm_config(trained, settings)
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = open_with(tmp_path)
    images = random_batch(3).images
    with torch.inference_mode():
        torch.testing.assert_close(backbone.model(images)[0], trained(images)[0])
    manifest = {**backbone.config, "made_from": backbone.made_from}
    assert backbone.is_source_of(manifest)
    assert "at 32 px, pooled by max, with" in describe_backbone(manifest)
    del manifest["global_pool"]
    assert not backbone.is_source_of(manifest), "of an earlier version, which ignored it"
    assert capsys.readouterr().err == ""

    config["model_args"]["act_layer"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    open_with(tmp_path)
    assert "was built with act_layer, which export leaves out" in capsys.readouterr().err
    config["model_args"] = {"global_pool": "median"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="test_vit does not pool by median"):
        open_with(tmp_path)


@pytest.mark.slow
def test_a_backbone_that_has_seen_the_rows_is_refused(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    run = tmp_path / "again"
    flags = ("--model", MODEL, "--name", "again", "--model_dir", run, *FEW)
    assert cli("export", *flags, "--pretrained", exported / "fold_0" / "backbone").code == 0
    where = ("--data", synth_dataset, "--output_dir", tmp_path / "out")
    assert cli("infer", "embed", "--config", "again", "--model_dir", run, *where).code == 0
    ended = cli(
        "infer", "fit", "--features", "frozen", "--frozen", tmp_path / "out" / "again", *where
    )
    assert ended.code == 2
    assert "learned from" in ended.err


@pytest.mark.slow
def test_an_exported_backbone_is_kept_and_another_one_refused(
    run: Path, weights: Path, tmp_path: Path, cli: Cli
) -> None:
    copy = shutil.copytree(run, tmp_path / "wild")
    common = ("--model", MODEL, "--name", "wild", "--model_dir", copy, *FEW)
    moved = shutil.copy(weights, tmp_path / "moved.safetensors")
    ended = cli("export", *common, "--pretrained", weights, "--image_size", SIZE)
    assert (ended.code, "up to date" in ended.out) == (0, True)
    ended = cli("export", *common, "--pretrained", moved, "--image_size", 2 * SIZE)
    assert ended.code == 2
    assert "fold_none holds test_vit at 32 px with weights of" in ended.err
    assert "or replace it with --force" in ended.err
    (copy / "fold_none" / "model.int8.onnx").write_text("an artifact of the earlier backbone")
    stale = json.loads((copy / "fold_none" / "model.onnx.json").read_text())
    text = json.dumps({**stale, "artifact": "model.int8.onnx"})
    (copy / "fold_none" / "model.int8.onnx.json").write_text(text)
    ended = cli("export", *common, "--pretrained", moved, "--image_size", 2 * SIZE, "--force")
    assert ended.code == 0, ended.err
    assert read_manifest(artifact_of(copy))["preprocess"]["size"] == 2 * SIZE
    assert not list((copy / "fold_none").glob("model.int8*"))


def test_the_parity_check_uses_the_images_of_a_dataset(
    run: Path, weights: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    copy = shutil.copytree(run, tmp_path / "wild")
    flags = ("--model", MODEL, "--name", "wild", "--model_dir", copy, "--pretrained", weights)
    ended = cli("export", *flags, "--image_size", SIZE, *FEW, "--data", synth_dataset, "--check")
    assert ended.code == 0, ended.err
    assert "parity on synthetic images" not in ended.out
    assert read_manifest(artifact_of(copy))["parity"]["images"] == "of --data"


def test_only_a_linear_classifier_that_came_with_the_weights_is_an_output(tmp_path: Path) -> None:
    def find(model: str, size: int, path: Path) -> int | None:
        settings = TrainSettings(model=model, pretrained=str(path), image_size=size)
        classifier = find_classifier(create_model(settings).eval(), settings)
        return classifier.out_features if classifier else None

    whole, bare = tmp_path / "whole.safetensors", tmp_path / "bare.safetensors"
    assert find(MODEL, SIZE, random_weights(whole)) == 1000
    assert find(MODEL, SIZE, random_weights(bare, num_classes=0)) is None
    distilled = "deit_tiny_distilled_patch16_224"
    assert (
        find(distilled, 32, random_weights(tmp_path / "two_heads.safetensors", distilled)) is None
    )


def test_a_wrong_class_logit_fails_the_parity_check() -> None:
    features = np.ones((5, 3), np.float32)
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    names = ("features", "class_logits")
    for change, fails in ((0.0, False), (0.01, True)):
        found = logits.copy()
        found[2, 4] += change
        figure = compare((features, logits), (features, found), names)
        if fails:
            with pytest.raises(ParityError, match="a class's logit is off by"):
                check_figure(figure, TOLERANCES["fp32"], "at batch 5")
        else:
            check_figure(figure, TOLERANCES["fp32"], "at batch 5")


def test_synthetic_images_are_the_same_every_time() -> None:
    spec = PreprocessSpec(size=16)
    first = synthetic_sample(spec, 6, seed=1)
    assert first.shape == (6, 16, 16, 3)
    np.testing.assert_array_equal(first, synthetic_sample(spec, 6, seed=1))
    assert (first != synthetic_sample(spec, 6, seed=0)).any()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config", "x", "--model", MODEL), "give one of them"),
        ((), "--config, the name of a trained config, or --model, a backbone of timm, is required"),
        (("--config", "x", "--pretrained", "true"), "--pretrained is for --model; leave it out"),
        (("--config", "x", "--image_size", 64), "--image_size is for --model; leave it out"),
        (("--model", MODEL, "--fold", 0), "--fold is for --config"),
        (("--model", MODEL, "--pretrained", "false"), "features of random weights are of no use"),
        (("--model", "test_vitt"), 'timm has no model "test_vitt"'),
        (("--model", MODEL, "--pretrained", "none.safetensors"), "no weights at none.safetensors"),
        (("--model", MODEL, "--triton", "t"), "--triton is for networks with a lesion head"),
    ],
)
def test_wrong_flags_are_refused(
    flags: tuple[object, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cli: Cli,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = cli("export", *flags)
    assert ended.code == 2
    assert message in ended.err
    assert not list(tmp_path.iterdir())


def test_a_trained_run_is_not_mixed_with_a_backbone(exported: Path, weights: Path) -> None:
    flags = {"model": MODEL, "pretrained": str(weights), "image_size": SIZE}
    backbone = open_backbone(ExportSettings.model_validate(flags))
    with pytest.raises(UserError, match="holds a trained run; choose another --name"):
        refuse_other_content(exported, backbone, force=True)


@pytest.mark.slow
def test_low_precision_and_views_pass_the_parity_check(
    run: Path, weights: Path, tmp_path: Path, cli: Cli
) -> None:
    copy = shutil.copytree(run, tmp_path / "wild")
    flags = ("--model", MODEL, "--name", "wild", "--model_dir", copy, "--pretrained", weights)
    for more in (("--precision", "fp16,int8"), ("--tta", "flips")):
        ended = cli("export", *flags, "--image_size", SIZE, *FEW, *more)
        assert ended.code == 0, ended.out


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_ten_families_pass_the_parity_check(model: str, tmp_path: Path, cli: Cli) -> None:
    path = random_weights(tmp_path / "weights.safetensors", model)
    flags = ("--pretrained", path, "--image_size", FAMILIES[model], "--model_dir", tmp_path / model)
    ended = cli("export", "--model", model, *flags, *FEW)
    assert ended.code == 0, ended.out + ended.err
    assert read_manifest(artifact_of(tmp_path / model))["parity"]["batch_16"]["cosine"] > 0.99999
