"""Exports folds: build, gate, publish."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import AliasChoices, Field

from export.formats import Format, find_format
from export.parity import ParityError, check_parity
from infer.engines import create
from isic import schema
from isic.config import Settings, Several
from isic.dataset import Dataset
from isic.errors import UserError
from isic.files import manifest_path, read_json, sha256, versions, write_json, write_manifest
from isic.folds import FILE as FOLDS_FILE
from isic.folds import read_folds
from isic.images import decode_pool
from isic.preprocess import Pixels, PreprocessSpec
from train.checkpoint import BEST, checkpoint_settings, load_checkpoint
from train.model import Classifier, create_model

NUM_PARITY_IMAGES = 14
PARITY_FILE = "parity.json"


class ExportSettings(Settings):
    """What `python -m export` takes."""

    config: str = Field(
        validation_alias=AliasChoices("config", "model_config"),
        description="name of the trained config (--model_config)",
    )
    model_dir: Path | None = Field(None, description="the trained run; outputs/<config> if not given")
    fold: int | None = Field(None, ge=0, description="export this fold alone; all trained folds if not given")
    formats: Several[str] = Field(("onnx",), description="formats, separated by commas")
    data: Path | None = Field(
        None, description="dataset with real images for the parity gate; the training's if not given"
    )
    force: bool = Field(False, description="export again what is up to date")

    @property
    def run_dir(self) -> Path:
        return self.model_dir or Path("outputs") / self.config


@dataclass(frozen=True)
class Source:
    """A fold's checkpoint, loaded."""

    path: Path
    sha256: str
    model: Classifier
    config: dict[str, Any]
    """Name, fold, features, folds digest and preprocessing, as the checkpoint has them."""
    data: Path
    """The dataset it was trained on."""

    @property
    def spec(self) -> PreprocessSpec:
        return PreprocessSpec(**self.config["preprocess"])


def export(settings: ExportSettings) -> int:
    """Exports the trained folds of a config, each artifact past the parity gate against its checkpoint.

    Exits with 1 where an artifact fails the gate; it is then not left under its final name.
    """
    formats = {name: find_format(name) for name in settings.formats}
    paths = find_checkpoints(settings)
    failed = 0
    print(f"{'fold':>4} {'format':8} {'MB':>7} {'seconds':>8} {'cosine':>10} {'logit error':>12}  artifact")
    for fold, path in paths.items():
        for name, format_ in formats.items():
            artifact = path.with_name(f"model{format_.suffix}")
            if is_current(artifact, path, settings.config, fold) and not settings.force:
                print(f"{fold:4} {name:8} up to date: {artifact}")
            else:
                failed += not export_one(load_source(path, fold, settings), name, format_, artifact, settings)
    return 1 if failed else 0


def find_checkpoints(settings: ExportSettings) -> dict[int, Path]:
    """Returns the checkpoint by fold. Raises UserError where there is none."""
    found = {int(path.parent.name.removeprefix("fold_")): path for path in settings.run_dir.glob(f"fold_*/{BEST}")}
    if settings.fold is not None:
        found = {fold: path for fold, path in found.items() if fold == settings.fold}
    if not found:
        which = "no fold" if settings.fold is None else f"no fold {settings.fold}"
        raise UserError(
            f"{settings.run_dir} has {which} with {BEST}; run `python -m train --config {settings.config}` first"
        )
    return dict(sorted(found.items()))


def is_current(artifact: Path, checkpoint: Path, config: str, fold: int) -> bool:
    """Whether the artifact was made from this very checkpoint of this config and fold, and is whole."""
    if not (artifact.is_file() and manifest_path(artifact).is_file()):
        return False
    manifest = read_json(manifest_path(artifact))
    is_of = (manifest["name"], manifest["fold"], manifest["made_from"]["sha256"])
    return is_of == (config, fold, sha256(checkpoint)) and bool(manifest["sha256"] == sha256(artifact))


def load_source(path: Path, fold: int, settings: ExportSettings) -> Source:
    """Loads a checkpoint into its model.

    Raises:
        UserError: the checkpoint is of another config or fold, or its weights do not fit its model.
    """
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    if (config["name"], config["fold"]) != (settings.config, fold):
        raise UserError(
            f"{path} is fold {config['fold']} of {config['name']}, not fold {fold} of {settings.config}; give the "
            "--config and --model_dir that belong together"
        )
    trained_with = checkpoint_settings(checkpoint)
    model = create_model(trained_with, pretrained=False)
    try:
        model.load_state_dict(checkpoint["model_state_dict"])
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {trained_with.model} ({str(error).splitlines()[1].strip()})") from None
    return Source(path, sha256(path), model.eval(), config, settings.data or trained_with.data)


def export_one(source: Source, name: str, format_: Format, artifact: Path, settings: ExportSettings) -> bool:
    """Builds one artifact beside its final name, gates it, and moves it there. Returns whether it passed."""
    fold, spec = source.config["fold"], source.spec
    images = parity_images(source)
    manifest = {**source.config, "format": name, "precision": "fp32"}
    candidate = artifact.with_name(f".candidate{format_.suffix}")
    try:
        started = time.perf_counter()
        format_.build(source.model, spec.size, candidate)
        seconds = time.perf_counter() - started
        engine = create(candidate, manifest, device="cpu")
        figures = check_parity(source.model, engine, images, format_.min_cosine, format_.max_logit_error)
        del engine  # Windows does not move a file that is open
        manifest_path(artifact).unlink(missing_ok=True)
        candidate.replace(artifact)
    except ParityError as error:
        artifact.unlink(missing_ok=True)
        write_json(artifact.with_name(PARITY_FILE), {**manifest, "passed": False, "reason": str(error)})
        print(f"{fold:4} {name:8} failed the parity gate: {error}")
        return False
    finally:
        candidate.unlink(missing_ok=True)
    made_from = {"checkpoint": source.path.name, "sha256": source.sha256}
    built_with = versions("torch", "timm", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")
    write_manifest(artifact, **manifest, made_from=made_from, parity=figures, versions=built_with)
    write_json(artifact.with_name(PARITY_FILE), {**manifest, "passed": True, "parity": figures})
    worst = {key: [figure[key] for figure in figures.values()] for key in ("cosine", "max_logit_error")}
    print(
        f"{fold:4} {name:8} {artifact.stat().st_size / 1e6:7.1f} {seconds:8.1f} {min(worst['cosine']):10.7f} "
        f"{max(worst['max_logit_error']):12.1e}  {artifact}"
    )
    return True


def parity_images(source: Source) -> Pixels:
    """Returns real images of the fold's held-out rows, uint8 [14, size, size, 3], by inference's own decoder."""
    dataset = Dataset(source.data)
    table = dataset.metadata("train")
    held_out = table.filter(read_folds(source.path.parents[1] / FOLDS_FILE).of(table) == source.config["fold"])
    store = dataset.images("train")
    ids = [
        name for name in held_out[schema.ID].to_list() if name not in set(store.missing(held_out[schema.ID].to_list()))
    ]
    ids = ids[:NUM_PARITY_IMAGES]
    images = np.empty((len(ids), source.spec.size, source.spec.size, 3), np.uint8)
    with decode_pool(1) as pool:
        failed = store.decode(ids, source.spec, images, pool)
    good = [row for row in range(len(ids)) if row not in failed]
    if not good:
        raise UserError(f"no image of fold {source.config['fold']} in {source.data} can be read; give --data")
    return images[good]
