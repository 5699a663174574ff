"""The network of an artifact: its views, its means and the types of its outputs."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.formats import TOLERANCES
from export.network import artifact_network, stack_views, turn_back
from export.parity import Reference, check_parity, run_averaged, run_model
from isic.preprocess import write_views
from isic.views import VIEWS
from tests.support.networks import (
    POINTWISE,
    SIZES,
    build_engine,
    network,
    reference_over,
    spec_of,
    with_all_outputs,
)
from train.config import TrainSettings
from train.model import Classifier, create_model

MANY_VIEWS = [tta for tta, views in VIEWS.items() if len(views) > 1]


def masked() -> Classifier:
    """Return a small network that predicts masks."""
    settings = TrainSettings(
        model="test_efficientnet", pretrained=False, image_size=32, mask_weight=1.0
    )
    return create_model(settings).eval()


def noise(number: int, size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (number, size, size, 3), np.uint8)


@pytest.mark.parametrize("tta", VIEWS)
def test_the_views_inside_the_graph_are_those_of_the_host(tta: str) -> None:
    images = noise(3, 5)
    expected = np.zeros((len(VIEWS[tta]), *images.shape), np.uint8)
    for row, image in enumerate(images):
        write_views(image, tta, list(expected[:, row]))
    maps = torch.from_numpy(images).permute(0, 3, 1, 2)
    stacked = stack_views(maps, VIEWS[tta]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(stacked, expected.reshape(-1, 5, 5, 3))


@pytest.mark.parametrize("tta", VIEWS)
def test_maps_of_the_views_are_turned_back(tta: str) -> None:
    mask = torch.rand(3, 1, 5, 5)
    stacked = stack_views(mask, VIEWS[tta]).reshape(-1, 3, 5, 5)
    assert torch.equal(turn_back(stacked, VIEWS[tta]), mask[:, 0].expand(len(VIEWS[tta]), 3, 5, 5))


@pytest.mark.parametrize("tta", MANY_VIEWS)
@pytest.mark.parametrize("name", [*SIZES, "masks", "all"])
def test_outputs_are_the_means_over_the_views(name: str, tta: str) -> None:
    others = {"masks": masked, "all": with_all_outputs}
    model = others[name]() if name in others else network(name)[0]
    images = noise(3, model.spec.size)
    with torch.inference_mode():
        outputs = artifact_network(model, "fp32", tta)(torch.from_numpy(images))
    expected = run_averaged(model, images, VIEWS[tta])
    assert len(outputs) == len(expected) == len(model.output_names)
    for found, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_mean_of_masks_is_of_masks_that_are_turned_back() -> None:
    """Of an image that is its own transpose, the mask over all views has the image's symmetry."""
    image = noise(1, 32)
    symmetric = np.maximum(image, image.transpose(0, 2, 1, 3))
    for view in VIEWS["d4"]:
        turned = np.rot90(symmetric, view[0], axes=(1, 2))
        symmetric = np.maximum(symmetric, turned[:, :, ::-1] if view[1] else turned)
    mask = run_averaged(masked(), symmetric, VIEWS["d4"])[2][0]
    np.testing.assert_allclose(mask, mask.T, atol=1e-5)
    np.testing.assert_allclose(mask, mask[::-1], atol=1e-5)
    plain = run_model(masked(), symmetric)[2][0]
    assert np.abs(plain - plain[::-1]).max() > 1e-3


@pytest.mark.parametrize("tta", VIEWS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_features_have_the_type_that_they_are_stored_in(precision: str, tta: str) -> None:
    artifact = artifact_network(with_all_outputs(), precision, tta)
    with torch.inference_mode():
        features, *others = artifact(torch.from_numpy(noise(2, 64)))
    assert len(others) == 3
    assert features.dtype == (torch.float32 if precision == "fp32" else torch.float16)
    assert {other.dtype for other in others} == {torch.float32}


@pytest.mark.slow
def test_an_artifact_with_views_is_the_mean_of_the_plain_one(tmp_path: Path) -> None:
    tta = "d4"
    model, reference = network(POINTWISE)
    plain = build_engine(model, spec_of(POINTWISE, "onnx", "fp32"), tmp_path)
    averaged = build_engine(model, spec_of(POINTWISE, "onnx", "fp32", tta=tta), tmp_path)
    images = reference.images[:5]
    views = np.zeros((len(VIEWS[tta]), *images.shape), np.uint8)
    for row, image in enumerate(images):
        write_views(image, tta, list(views[:, row]))
    for output, found in enumerate(averaged.run(images)):
        expected = np.mean([plain.run(view)[output] for view in views], axis=0)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert {path.name for path in tmp_path.glob("*.onnx")} == {"model.onnx", f"model.{tta}.onnx"}
    graph = onnx.load(tmp_path / f"model.{tta}.onnx")
    assert {prop.key: prop.value for prop in graph.metadata_props}["tta"] == tta
    batches = {
        value.type.tensor_type.shape.dim[0].dim_param
        for value in (*graph.graph.input, *graph.graph.output)
    }
    assert len(batches) == 1 and "" not in batches, "the batch stays open"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format_name", "precision", "tta"),
    [
        ("onnx", "fp32", "none"),
        ("onnx", "fp16", "flips"),
        ("onnx", "int8", "none"),
        ("aoti", "fp32", "none"),
        ("aoti", "bf16", "flips"),
    ],
)
def test_all_outputs_pass_the_parity_check(
    format_name: str, precision: str, tta: str, tmp_path: Path
) -> None:
    model = with_all_outputs()
    reference = Reference(model, noise(12, 64), tta=tta)
    spec = spec_of(POINTWISE, format_name, precision, tta=tta, max_batch=8, opt_batch=4)
    engine = build_engine(model, spec, tmp_path)
    figures = check_parity(reference, engine, TOLERANCES[precision], spec.batch_sizes)
    assert {"max_logit_error", "max_aux_error", "max_mask_error"} <= figures["batch_2"].keys()
    _, _, aux = engine.run(reference.images[:5])
    assert aux.dtype == np.float32
    assert aux.shape == (5, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format_name", "precision"),
    [("onnx", "fp16"), ("onnx", "int8"), ("aoti", "fp32"), ("aoti", "bf16")],
)
def test_an_artifact_with_views_passes_the_parity_check(
    format_name: str, precision: str, tmp_path: Path
) -> None:
    name = POINTWISE
    reference = reference_over(name, "d4")
    spec = spec_of(name, format_name, precision, tta="d4", max_batch=8, opt_batch=4)
    engine = build_engine(network(name)[0], spec, tmp_path)
    assert check_parity(reference, engine, TOLERANCES[precision], spec.batch_sizes)
    features, logits = engine.run(reference.images[:3])
    is_low = precision in {"fp16", "bf16"}
    assert features.dtype == (np.float16 if is_low else np.float32)
    assert logits.dtype == np.float32
