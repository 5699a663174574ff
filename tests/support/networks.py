"""A small network of each family, and its artifacts."""

from functools import cache
from pathlib import Path

import numpy as np

from export.formats import ArtifactSpec, BuildInputs, build_artifact, file_name
from export.options import PlanOptions
from export.parity import Reference
from infer.engines import Engine, create
from train.config import TrainSettings
from train.model import Classifier, create_model, preprocess_spec

POINTWISE = "test_efficientnet"
"""A network of 1x1 convolutions, two of them wide."""


SIZES = {
    POINTWISE: 64,
    "test_vit3": 64,
    "test_convnext": 64,
    "test_convnext3": 64,
    "eva02_tiny_patch14_224": 56,
}
"""A small network of each family and its image size; test_convnext3 has GRN."""


@cache
def network(name: str) -> tuple[Classifier, Reference]:
    model = create_model(TrainSettings(model=name, pretrained=False, image_size=SIZES[name])).eval()
    images = np.random.default_rng(1).integers(
        0, 256, (25, SIZES[name], SIZES[name], 3), dtype=np.uint8
    )
    return model, Reference(model, images)


@cache
def with_all_outputs() -> Classifier:
    """Return the network POINTWISE with two auxiliary targets and masks."""
    settings = TrainSettings.model_validate(
        {
            "model": POINTWISE,
            "pretrained": False,
            "image_size": SIZES[POINTWISE],
            "aux": "a: x; b: y",
            "mask_weight": 1.0,
        }
    )
    return create_model(settings).eval()


def reference_over(name: str, tta: str) -> Reference:
    """Return the reference of a network over views, of fewer images than `network` has."""
    model, plain = network(name)
    return Reference(model, plain.images[:12], tta=tta)


def spec_of(name: str, format_name: str, precision: str, **options: object) -> ArtifactSpec:
    return ArtifactSpec(
        config=name,
        fold=0,
        format=format_name,
        precision=precision,
        device="cpu",
        options=PlanOptions.model_validate(options),
    )


def build_engine(model: Classifier, spec: ArtifactSpec, folder: Path) -> Engine:
    """Build the artifact of a network that has the name of the spec's config."""
    size = SIZES[spec.config]
    settings = TrainSettings(model=spec.config, pretrained=False, image_size=size)
    path = folder / file_name(spec)
    aux = {f"target_{number}": "column" for number in range(model.num_aux)}
    inputs = BuildInputs(model, preprocess_spec(settings), cache_dir=folder, aux=tuple(aux))
    facts = {**spec.facts, **build_artifact(spec, inputs, path), **({"aux": aux} if aux else {})}
    if model.mask_stride:
        facts["mask_stride"] = model.mask_stride
    return create(path, {**facts, "preprocess": {"size": size}}, "cpu")
