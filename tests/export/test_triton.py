import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from export.triton import ONNX_DTYPES, TRITON_DTYPES, mean_model, to_pbtxt, write_repository
from infer.engines import load
from infer.engines.contract import GRAPH_CONTRACT
from isic.runtime.errors import UserError
from isic.runtime.files import manifest_path, read_manifest, sha256, write_manifest

text_format = pytest.importorskip("google.protobuf.text_format")
schema = pytest.importorskip(
    "tritonclient.grpc.model_config_pb2", reason="Triton's published schema is not installed"
)


def parsed(root: Path, model: str) -> Any:
    """The configuration as Triton's own schema reads it; an unknown field is an error."""
    return text_format.Parse((root / model / "config.pbtxt").read_text(), schema.ModelConfig())


def tensors(fields: Any) -> dict[str, tuple[str, list[int]]]:
    return {
        field.name: (schema.DataType.Name(field.data_type), list(field.dims)) for field in fields
    }


@pytest.fixture(scope="module")
def repository(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository of the tiny run's three folds."""
    root = tmp_path_factory.mktemp("triton") / "models"
    names = write_repository(root, [exported / f"fold_{fold}" / "model.onnx" for fold in range(3)])
    assert names == ["tiny_fold_0", "tiny_fold_1", "tiny_fold_2", "tiny_mean", "tiny"]
    assert sorted(path.name for path in root.iterdir()) == sorted(names)
    return root


def test_a_folds_model_is_as_triton_wants_it(repository: Path, exported: Path) -> None:
    config = parsed(repository, "tiny_fold_1")
    assert (config.name, config.backend, config.max_batch_size) == (
        "tiny_fold_1",
        "onnxruntime",
        256,
    )
    assert tensors(config.input) == {"images": ("TYPE_UINT8", [32, 32, 3])}
    assert tensors(config.output) == {"features": ("TYPE_FP32", [64]), "logits": ("TYPE_FP32", [1])}
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds > 0
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_AUTO
    manifest = read_manifest(exported / "fold_1" / "model.onnx")
    assert json.loads(config.parameters["preprocess"].string_value) == manifest["preprocess"]
    served = repository / "tiny_fold_1" / "1" / config.default_model_filename
    assert sha256(served) == config.parameters["sha256"].string_value == manifest["sha256"]


def test_the_ensemble_routes_every_tensor_it_names(repository: Path) -> None:
    """Every input of a step is an input of the ensemble or another step's output, of its type."""
    config = parsed(repository, "tiny")
    assert config.platform == "ensemble"
    assert (repository / "tiny" / "1").is_dir()
    assert not config.instance_group
    assert not config.HasField("dynamic_batching"), "Triton refuses both"
    known = tensors(config.input)
    for step in config.ensemble_scheduling.step:
        model = parsed(repository, step.model_name)
        assert config.max_batch_size <= model.max_batch_size
        assert set(step.input_map) == set(tensors(model.input))
        for name, tensor in step.input_map.items():
            assert known[tensor] == tensors(model.input)[name]
        known |= {tensor: tensors(model.output)[name] for name, tensor in step.output_map.items()}
    outputs = tensors(config.output)
    assert set(outputs) == {"logits", "probabilities", "features_0", "features_1", "features_2"}
    assert all(known[name] == tensor for name, tensor in outputs.items())


def test_the_steps_run_one_after_another_give_the_mean_of_the_folds(
    repository: Path, exported: Path
) -> None:
    """The ensemble's steps run in ONNX Runtime as Triton routes them, versus the engines."""
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    tensors: dict[str, Any] = {"images": images}
    for step in parsed(repository, "tiny").ensemble_scheduling.step:
        session = ort.InferenceSession(
            repository / step.model_name / "1" / "model.onnx", providers=["CPUExecutionProvider"]
        )
        values = session.run(
            list(step.output_map), {name: tensors[key] for name, key in step.input_map.items()}
        )
        tensors |= dict(zip(step.output_map.values(), values, strict=True))
    engines = [load(exported / f"fold_{fold}" / "model.onnx", "cpu") for fold in range(3)]
    mean = np.mean([engine.run(images)[1] for engine in engines], axis=0)
    np.testing.assert_allclose(tensors["logits"], mean, atol=1e-5)
    np.testing.assert_allclose(tensors["probabilities"], 1 / (1 + np.exp(-mean)), atol=1e-5)
    np.testing.assert_allclose(tensors["features_2"], engines[2].run(images)[0], atol=1e-5)


def test_the_mean_takes_any_number_of_folds_and_images() -> None:
    names = [f"logits_{fold}" for fold in range(5)]
    session = ort.InferenceSession(
        mean_model(names).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    logits = np.random.default_rng(0).normal(size=(5, 7, 1)).astype(np.float32)
    mean, _ = session.run(None, dict(zip(names, logits, strict=True)))
    np.testing.assert_allclose(mean, logits.mean(axis=0), atol=1e-6)


AUX = {"mel": "iddx_full ~ Melanoma", "seen": "lesion_id"}


def plan_manifest(
    exported: Path, fold: int, path: Path, features: str = "float32", **changes: Any
) -> Path:
    """A plan by its manifest; its bytes are no plan, for TensorRT needs a GPU to build one."""
    path.write_bytes(b"plan")
    manifest = read_manifest(exported / f"fold_{fold}" / "model.onnx")
    tensors = {
        "images": {"dtype": "uint8", "shape": [-1, 32, 32, 3]},
        "features": {"dtype": features, "shape": [-1, 64]},
        "logits": {"dtype": "float32", "shape": [-1, 1]},
        "aux": {"dtype": "float32", "shape": [-1, 2]},
        "mask": {"dtype": "float32", "shape": [-1, 16, 16]},
    }
    plan = {"profile": {"min": 1, "opt": 16, "max": 32}, "tensors": tensors}
    fields = {**manifest, "format": "tensorrt", "plan": plan, "aux": AUX, **changes}
    write_manifest(
        path, **{key: fields[key] for key in fields if key not in {"artifact", "sha256"}}
    )
    return path


def test_plans_are_served_within_their_profile_and_masks_side_by_side(
    exported: Path, tmp_path: Path
) -> None:
    paths = [plan_manifest(exported, fold, tmp_path / f"{fold}.plan") for fold in range(2)]
    write_repository(tmp_path / "models", paths)
    config = parsed(tmp_path / "models", "tiny_fold_0")
    assert (config.backend, config.max_batch_size) == ("tensorrt", 32)
    assert list(config.dynamic_batching.preferred_batch_size) == [16]
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
    assert (tmp_path / "models" / "tiny_fold_0" / "1" / "model.plan").read_bytes() == b"plan"
    outputs = tensors(parsed(tmp_path / "models", "tiny").output)
    assert outputs["mask_1"] == ("TYPE_FP32", [16, 16])
    assert outputs["aux_0"] == outputs["aux_1"] == ("TYPE_FP32", [2])
    assert json.loads(config.parameters["aux"].string_value) == AUX
    assert parsed(tmp_path / "models", "tiny").max_batch_size == 32


def test_features_have_the_type_of_their_artifact(exported: Path, tmp_path: Path) -> None:
    half = plan_manifest(exported, 0, tmp_path / "0.plan", features="float16")
    single = plan_manifest(exported, 1, tmp_path / "1.plan")
    write_repository(tmp_path / "models", [half, single])
    outputs = [parsed(tmp_path / "models", f"tiny_fold_{fold}").output for fold in range(2)]
    assert [tensors(output)["features"] for output in outputs] == [
        ("TYPE_FP16", [64]),
        ("TYPE_FP32", [64]),
    ]
    ensemble = tensors(parsed(tmp_path / "models", "tiny").output)
    assert (ensemble["features_0"][0], ensemble["features_1"][0]) == ("TYPE_FP16", "TYPE_FP32")
    assert ensemble["logits"][0] == "TYPE_FP32"


def test_every_type_of_the_contract_has_triton_s_name() -> None:
    dtypes = {dtype for spec in GRAPH_CONTRACT.values() for dtype in spec.dtypes}
    assert dtypes == set(TRITON_DTYPES) == set(ONNX_DTYPES.values())
    assert set(TRITON_DTYPES.values()) <= set(schema.DataType.keys())


def test_one_fold_needs_no_ensemble_and_a_second_writing_replaces_the_first(
    exported: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    for fold in (2, 2):
        assert write_repository(tmp_path, [exported / f"fold_{fold}" / "model.onnx"]) == [
            "tiny_fold_2"
        ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "tiny_fold_2"]


def test_a_fold_does_not_join_an_older_ensemble(exported: Path, tmp_path: Path) -> None:
    artifacts = [exported / f"fold_{fold}" / "model.onnx" for fold in range(2)]
    root = tmp_path / "models"
    write_repository(root, artifacts)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    words = f"^{root / 'tiny'} is an ensemble of several folds.*; export all folds, or choose"
    for artifact in (artifacts[0], exported / "fold_2" / "model.onnx"):
        with pytest.raises(UserError, match=words):
            write_repository(root, [artifact])
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    # A network of every row is in no ensemble.
    whole = plan_manifest(exported, 0, tmp_path / "whole.plan")
    text = manifest_path(whole).read_text()
    manifest_path(whole).write_text(text.replace('"fold": 0', '"fold": "all"'))
    assert write_repository(root, [whole]) == ["tiny_fold_all"]
    write_repository(root, artifacts)


def test_what_triton_cannot_serve_is_refused(exported: Path, tmp_path: Path) -> None:
    portable = plan_manifest(exported, 0, tmp_path / "a.plan", format="tensorrt_rtx")
    other = plan_manifest(exported, 1, tmp_path / "b.plan", name="other")
    real = exported / "fold_0" / "model.onnx"
    bare = Path(shutil.copy(real, tmp_path / "bare.onnx"))
    for paths, words in (
        ([portable], "not the tensorrt_rtx of"),
        ([real, other], "exactly one artifact per fold"),
        ([real, real], "exactly one artifact per fold"),
        ([bare], "is missing"),
    ):
        with pytest.raises(UserError, match=words):
            write_repository(tmp_path / "models", paths)
    assert not (tmp_path / "models").exists()
    assert not manifest_path(bare).exists()


def test_text_is_quoted_as_protobuf_reads_it() -> None:
    config = schema.ModelConfig()
    text_format.Parse(to_pbtxt({"name": 'a "quoted" \\ name', "max_batch_size": 3}), config)
    assert config.name == 'a "quoted" \\ name'
    assert config.max_batch_size == 3


def test_another_model_under_the_name_is_not_replaced(exported: Path, tmp_path: Path) -> None:
    artifacts = [exported / f"fold_{fold}" / "model.onnx" for fold in range(2)]
    other = tmp_path / "tiny_mean" / "config.pbtxt"
    other.parent.mkdir()
    other.write_text("mine")
    with pytest.raises(UserError, match=r"was not written by this command.*--triton"):
        write_repository(tmp_path, artifacts)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny_mean"]
    other.unlink()
    assert write_repository(tmp_path, artifacts) == write_repository(tmp_path, artifacts)
