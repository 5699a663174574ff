import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from export.formats import TOLERANCES, ArtifactSpec, BuildInputs
from export.parity import ParityError, check_parity, compare
from export.run import ExportSettings, load_source
from infer.engines import load
from isic.preprocess import Pixels
from isic.runtime.files import read_manifest, sha256
from tests.support.commands import Cli
from train.checkpoint import BEST, load_checkpoint, save_checkpoint


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported run that a test may break."""
    return shutil.copytree(exported, tmp_path / "tiny")


def test_the_graph_keeps_the_contract(exported: Path) -> None:
    graph = onnx.load(exported / "fold_0" / "model.onnx").graph
    shapes = {
        value.name: (
            value.type.tensor_type.elem_type,
            [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim],
        )
        for value in (*graph.input, *graph.output)
    }
    batch = shapes["images"][1][0]
    assert isinstance(batch, str), "the batch is dynamic"
    assert shapes["images"] == (onnx.TensorProto.UINT8, [batch, 32, 32, 3])
    assert shapes["features"] == (onnx.TensorProto.FLOAT, [batch, 64])
    assert shapes["logits"] == (onnx.TensorProto.FLOAT, [batch, 1])
    readers = {node.op_type for node in graph.node if "images" in node.input}
    assert readers <= {"Cast", "Shape"}, "TensorRT refuses to transpose uint8"


def test_the_engine_says_what_the_checkpoint_says(exported: Path) -> None:
    source = load_source(
        exported / "fold_1" / BEST, 1, ExportSettings(config="tiny", model_dir=exported)
    )
    images = np.random.default_rng(5).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)
    features, logits = load(exported / "fold_1" / "model.onnx", "cpu").run(images)
    with torch.inference_mode():
        want_features, want_logits = source.model(torch.from_numpy(images))
    np.testing.assert_allclose(features, want_features, atol=1e-4)
    np.testing.assert_allclose(logits, want_logits, atol=1e-4)


def test_the_manifest_ties_the_artifact_to_its_checkpoint(exported: Path) -> None:
    for fold in range(3):
        manifest = read_manifest(exported / f"fold_{fold}" / "model.onnx")
        assert (manifest["name"], manifest["fold"], manifest["format"]) == ("tiny", fold, "onnx")
        assert manifest["made_from"]["sha256"] == sha256(exported / f"fold_{fold}" / BEST)
        parity = manifest["parity"]
        assert [name for name in parity if name.startswith("batch_")] == [
            "batch_1",
            "batch_2",
            "batch_8",
            "batch_16",
        ]
        assert all(parity[f"batch_{size}"]["cosine"] >= 0.99999 for size in (1, 2, 8, 16))
        assert parity["rank_correlation"] > 0.9999 and abs(parity["pauc_change"]) < 1e-3


def test_what_is_up_to_date_is_kept_and_what_is_stale_is_made_again(run: Path, cli: Cli) -> None:
    ended = cli("export", "--config", "tiny", "--model_dir", run, "--fold", 0)
    assert ended.code == 0 and "up to date" in ended.out
    checkpoint = load_checkpoint(run / "fold_0" / BEST)
    checkpoint["model_state_dict"]["head.1.bias"] += 1
    save_checkpoint(run / "fold_0" / BEST, **checkpoint)
    before = sha256(run / "fold_0" / "model.onnx")
    ended = cli("export", "--config", "tiny", "--model_dir", run, "--fold", 0)
    assert ended.code == 0 and "up to date" not in ended.out
    assert sha256(run / "fold_0" / "model.onnx") != before


class Wrong:
    """An engine that differs from its checkpoint in one way."""

    device = "cpu"

    def __init__(self, engine: object, change: str) -> None:
        self.engine, self.change = engine, change

    def run(self, images: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if self.change == "channels":
            images = np.ascontiguousarray(images[..., ::-1])
        if self.change == "transposed":
            images = np.ascontiguousarray(images.transpose(0, 2, 1, 3))
        features, logits = self.engine.run(images)  # type: ignore[attr-defined]
        if self.change == "nan":
            features[0, 0] = np.nan
        if self.change == "dtype":
            features = features.astype(np.float16)
        if self.change == "shape":
            features = features[:, :-1]
        if self.change == "order":
            features, logits = features[::-1], logits[::-1]
        if self.change == "logit":
            logits = logits + 0.01
        return features, logits


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("channels", "cosine|logit"),
        ("transposed", "cosine|logit"),
        ("order", "cosine|logit"),
        ("nan", "not finite"),
        ("dtype", "float16"),
        ("shape", "63"),
        ("logit", "a logit is off by 0.01"),
    ],
)
def test_the_gate_stops_a_wrong_engine(exported: Path, change: str, words: str) -> None:
    source = load_source(
        exported / "fold_0" / BEST, 0, ExportSettings(config="tiny", model_dir=exported)
    )
    engine = load(exported / "fold_0" / "model.onnx", "cpu")
    assert check_parity(source.reference, engine, TOLERANCES["fp32"], (1, 8))
    with pytest.raises(ParityError, match=words):
        check_parity(source.reference, Wrong(engine, change), TOLERANCES["fp32"], (8,))  # type: ignore[arg-type]


def test_cosine_is_the_worst_images() -> None:
    features = np.eye(3, dtype=np.float32)
    turned = features.copy()
    turned[2] = [0, 1, 1]
    logits = np.zeros((3, 1), np.float32)
    assert compare((features, logits), (turned, logits))["cosine"] == pytest.approx(np.sqrt(0.5))


def test_a_failed_gate_leaves_no_artifact_and_exits_1(
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
    assert ended.code == 1 and "failed the parity check" in ended.out
    assert not (run / "fold_0" / "model.onnx").exists()
    assert json.loads((run / "fold_0" / "parity.json").read_text())["model.onnx"]["passed"] is False
    assert not list((run / "fold_0").glob(".candidate*"))


def test_bad_input_is_one_sentence(run: Path, cli: Cli, tmp_path: Path) -> None:
    for flags, words in (
        (["--config", "other", "--model_dir", run], "is fold 0 of tiny, not fold 0 of other"),
        (
            ["--config", "tiny", "--model_dir", tmp_path / "none"],
            "run `python -m train --config tiny` first",
        ),
        (["--config", "tiny", "--model_dir", run, "--fold", 7], "no fold 7"),
        (
            ["--config", "tiny", "--model_dir", run, "--force", "--data", tmp_path / "none"],
            "no such folder",
        ),
    ):
        ended = cli("export", *flags)
        assert ended.code == 2 and words in ended.err and ended.err.count("\n") == 1


def test_a_checkpoint_in_another_folds_folder_is_refused(run: Path, cli: Cli) -> None:
    shutil.copy(run / "fold_1" / BEST, run / "fold_0" / BEST)
    ended = cli("export", "--config", "tiny", "--model_dir", run, "--fold", 0)
    assert ended.code == 2 and "is fold 1 of tiny, not fold 0" in ended.err
