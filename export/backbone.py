"""A backbone as its weights were found: no lesion head, and any classifier that came with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from export.options import ExportSettings
from infer.engines.contract import CLASS_LOGITS, FEATURES
from isic.dataset import refuse_dataset
from isic.layout import (
    ALL,
    BEST_CHECKPOINT,
    FOLDS_FILE,
    NONE,
    TRAINED_ON_FILE,
    fold_dir,
    fold_dirs,
    fold_files,
)
from isic.preprocess import Pixels, PreprocessSpec, decode, resize
from isic.provenance import write_seen
from isic.runtime.errors import UserError, warn
from isic.runtime.fields import Count, Fields, read_fields
from isic.runtime.files import read_json, sha256
from isic.synth.crops import crop_specs, render
from isic.synth.rows import draw_rows, num_patients
from train.backbone import INTERPOLATIONS, TIMM_CONFIG_FILE
from train.config import TrainSettings
from train.model import Classifier, create_model
from train.pretrained import Weights, find_weights, hub_file, tensors_sha256
from train.timm_models import (
    LIBRARY_ERRORS,
    backbone_options,
    create_backbone,
    pretrained_config,
)


class Backbone(Classifier):
    """A network without a lesion head, whose only linear head is the classifier of its weights."""

    def __init__(
        self, backbone: nn.Module, spec: PreprocessSpec, classifier: nn.Linear | None
    ) -> None:
        """Wrap a backbone; `classifier` takes its features and returns logits [N, K]."""
        super().__init__(backbone, spec)
        self.num_classes = classifier.out_features if classifier else 0
        self.head = nn.Sequential(classifier) if classifier else nn.Sequential()

    @property
    def linear_heads(self) -> list[nn.Sequential]:
        return [self.head] if self.num_classes else []

    @property
    def output_names(self) -> tuple[str, ...]:
        return (FEATURES, CLASS_LOGITS) if self.num_classes else (FEATURES,)


class InputFields(Fields):
    """The network's input in a `config.json` of timm, which may lack any field."""

    mean: list[float] = Field([0.0] * 3, min_length=3, max_length=3)
    std: list[Annotated[float, Field(gt=0)]] = Field([1.0] * 3, min_length=3, max_length=3)
    input_size: list[Count] = Field([3, 1, 1], min_length=3, max_length=3)
    interpolation: str = ""


class TimmConfig(InputFields):
    """A `config.json` of timm; earlier versions have no inner mapping."""

    pretrained_cfg: InputFields | None = None
    model_args: dict[str, Any] | None = None


@dataclass(frozen=True)
class OpenBackbone:
    """A backbone in eval mode on the CPU, and the facts about it."""

    model: Backbone
    weights: Weights
    config: dict[str, Any]
    """The fields of the manifest about the network."""

    @cached_property
    def made_from(self) -> dict[str, str]:
        """The entry of a manifest that names the weights."""
        # Of the tensors, because weights from timm or a hub are no file here, and because a
        # classifier that could not be used is no part of the network.
        return {"weights": self.weights.source, "sha256": tensors_sha256(self.model)}

    def is_source_of(self, manifest: Mapping[str, Any]) -> bool:
        """Return whether an artifact is of this backbone, by its manifest."""
        # Not by the weights' source: a file may have been moved.
        keys = ("model", "preprocess", "global_pool")
        same = all(manifest.get(key) == self.config.get(key) for key in keys)
        return same and bool(manifest["made_from"]["sha256"] == self.made_from["sha256"])


def open_backbone(settings: ExportSettings) -> OpenBackbone:
    """Build the backbone of `--model` and load its weights.

    Raises:
        UserError: no such model, its weights cannot be loaded, or the model does not fit the size.
    """
    assert settings.model is not None
    # Of a run, the backbone that has seen every row, if there is one.
    weights = find_weights(settings.pretrained, ALL)
    pretrained = str(weights.path) if weights.path else settings.pretrained
    beside = config_beside(weights)
    timm_config = input_config(settings.model, weights, beside)
    usual = {timm: ours for ours, timm in INTERPOLATIONS.items()}
    build = TrainSettings(
        name=settings.run_name,
        model=settings.model,
        pretrained=pretrained,
        image_size=settings.image_size or timm_config["input_size"][-1],
        interpolation=usual.get(timm_config["interpolation"], "linear"),
    )
    # Not validated: timm pools in more ways than training offers, and refuses others itself.
    build = build.model_copy(update={"global_pool": find_pooling(weights, beside)})
    trained = create_model(build).eval()
    classifier = find_classifier(trained, build)
    normalisation = {key: timm_config[key] for key in ("mean", "std")}
    spec = PreprocessSpec(**{**trained.spec.model_dump(), **normalisation})
    model = Backbone(trained.backbone, spec, classifier).eval()
    config = {
        "name": settings.run_name,
        "model": settings.model,
        "num_features": model.num_features,
        "fold": NONE,
        "preprocess": model.spec.model_dump(mode="json"),
        "pretrained": weights.manifest_fields(model.backbone),
    }
    if build.global_pool:
        config["global_pool"] = build.global_pool
    if classifier:
        config["num_classes"] = model.num_classes
    return OpenBackbone(model, weights, config)


def describe_backbone(config: Mapping[str, Any]) -> str:
    """Return words on a backbone: its model, size, weights and outputs, from its manifest."""
    pooling = f", pooled by {config['global_pool']}," if "global_pool" in config else ""
    return (
        f"{config['model']} at {config['preprocess']['size']} px{pooling} with weights of "
        f"{config['pretrained']['source']}, {config['num_features']:,} features, "
        f"{config.get('num_classes') or 'no'} class logits"
    )


def input_config(model: str, weights: Weights, beside: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return timm's config of the input: the one next to the weights, or else the model's own."""
    own = pretrained_config(model)
    given = beside.get("pretrained_cfg") or beside  # earlier versions of timm have no inner mapping
    if weights.repository and not {"mean", "std"} <= given.keys():
        warn(
            f"no {TIMM_CONFIG_FILE} with mean and std can be read from {weights.repository}; "
            f"taking those of {model}, {own['mean']} and {own['std']}"
        )
    return {**own, **given}


def config_beside(weights: Weights) -> dict[str, Any]:
    """Return timm's config from the folder or hub repository of the weights, empty without one."""
    if weights.repository:
        path = hub_file(weights.repository, TIMM_CONFIG_FILE)
    else:
        path = weights.path and weights.path.with_name(TIMM_CONFIG_FILE)
    if not (path and path.is_file()):
        return {}
    return read_fields(path, TimmConfig, "correct it, or remove it to use the model's own")


def find_pooling(weights: Weights, beside: Mapping[str, Any]) -> str | None:
    """Return the pooling of the config next to the weights; None is the model's own.

    Warn if it has other arguments that the features may depend on.
    """
    options = dict(beside.get("model_args") or {})
    pooling: str | None = options.pop("global_pool", None)
    options.pop("img_size", None)  # the size of the input says the same
    if options:
        warn(
            f"the model of {weights.source} was built with {', '.join(options)}, which export "
            "leaves out; its features may differ"
        )
    return pooling


@torch.no_grad()
def find_classifier(model: Classifier, settings: TrainSettings) -> nn.Linear | None:
    """Return the classifier that came with the weights, None if there is none to use.

    It must be one linear layer on the features; the averaged heads of distilled networks are not.

    Args:
        model: the network without it, in eval mode.
    """
    if not pretrained_config(settings.model)["num_classes"]:
        return None
    options = backbone_options(settings)
    del options["num_classes"]
    try:
        whole: Any = create_backbone(settings.model, settings.pretrained, options).eval()
    except (UserError, *LIBRARY_ERRORS):
        return None  # the backbone has been loaded from the same weights, so they lack the rest
    classifier = whole.get_classifier()
    if not isinstance(classifier, nn.Linear) or classifier.in_features != model.num_features:
        return None
    images = np.random.default_rng(0).integers(0, 256, (1, model.spec.size, model.spec.size, 3))
    maps = model.normalised(torch.from_numpy(images.astype(np.uint8)))
    expected = whole(maps)
    found = classifier(model.backbone(maps))
    return classifier if torch.allclose(found, expected, rtol=1e-3, atol=1e-3) else None


def refuse_other_content(run: Path, backbone: OpenBackbone, force: bool) -> None:
    """Raise a UserError if a run's folder holds anything but this backbone.

    Args:
        force: accept another backbone.
    """
    refuse_dataset(run, "--name or --model_dir")
    if fold_dirs(run) or fold_files(run, BEST_CHECKPOINT, ALL) or (run / FOLDS_FILE).exists():
        raise UserError(f"{run} holds a trained run; choose another --name for the backbone")
    folder = fold_dir(run, NONE)
    for found in map(read_json, artifact_manifests(folder)):
        if not (force or backbone.is_source_of(found)):
            raise UserError(
                f"{folder} holds {describe_backbone(found)}; choose another --name, or replace it "
                "with --force"
            )


def begin_backbone(run: Path, backbone: OpenBackbone) -> dict[str, Any]:
    """Write the list of images that the weights have learned from; remove another backbone.

    Returns:
        The fields of the manifest about the network.
    """
    folder = fold_dir(run, NONE)
    for path in artifact_manifests(folder):
        found = read_json(path)
        if not backbone.is_source_of(found):
            (folder / found["artifact"]).unlink(missing_ok=True)
            path.unlink()
    write_seen(folder / TRAINED_ON_FILE, backbone.weights.seen)
    return {**backbone.config, "trained_on": sha256(folder / TRAINED_ON_FILE)}


def artifact_manifests(folder: Path) -> list[Path]:
    """Return the manifests of the artifacts in a folder."""
    return [path for path in sorted(folder.glob("*.json")) if "artifact" in read_json(path)]


def synthetic_sample(spec: PreprocessSpec, num_images: int, seed: int) -> Pixels:
    """Return rendered lesions, uint8 [R, size, size, 3]; a seed always gives the same ones."""
    names = [str(number) for number in range(num_images)]
    rng = np.random.default_rng(seed)
    rows = draw_rows(names, names[: num_patients(num_images)], num_images // 4, rng)
    crops = [render(each, (seed, row)) for row, each in enumerate(crop_specs(rows.table, rows.cue))]
    return np.stack([resize(decode(crop.jpeg), spec) for crop in crops])
