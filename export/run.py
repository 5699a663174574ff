"""Exports folds: build, gate, publish."""

import contextlib
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import AliasChoices, Field

from export.formats import FORMATS, TOLERANCES, Target, device_of, find_formats
from export.options import PlanOptions, check_options
from export.parity import ParityError, Reference, check_parity
from export.triton import write_repository
from infer.engines import create, unavailable_reason
from isic import schema
from isic.dataset import Dataset
from isic.folds import FILE as FOLDS_FILE
from isic.folds import fold_dirs, read_folds
from isic.images import decode_pool
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.arithmetic import ceil_div
from isic.runtime.config import Several
from isic.runtime.errors import UserError
from isic.runtime.files import (
    manifest_path,
    read_json,
    read_manifest,
    sha256,
    versions,
    write_json,
    write_manifest,
)
from isic.runtime.machine import cpu_features, processor
from train.checkpoint import BEST, checkpoint_settings, load_checkpoint
from train.model import Classifier, create_model

PARITY_FILE = "parity.json"
PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")
HEADER = "fold format       types      MB  seconds     cosine  logit error     rank  artifact"


class ExportSettings(PlanOptions):
    """What `python -m export` takes."""

    config: str = Field(
        validation_alias=AliasChoices("config", "model_config"),
        description="name of the trained config (--model_config)",
    )
    model_dir: Path | None = Field(
        None, description="the trained run; outputs/<config> if not given"
    )
    fold: int | None = Field(
        None, ge=0, description="export this fold alone; all trained folds if not given"
    )
    formats: Several[str] = Field(
        ("onnx",), description=f"of {', '.join(FORMATS)}, separated by commas"
    )
    precision: Several[str] = Field(
        (),
        description="fp32, fp16, bf16, int8 or fp8, separated by commas; each format's usual one if not given",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="what the artifacts will run on"
    )
    data: Path | None = Field(
        None,
        description="dataset with real images for the parity gate; the training's if not given",
    )
    parity_images: int = Field(
        256, ge=1, description="held-out images that the parity gate compares"
    )
    check: bool = Field(False, description="gate what is there on this machine, and build nothing")
    triton: Path | None = Field(
        None, description="also write a model repository for NVIDIA Triton into this folder"
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
    """The dataset whose images the gate compares on."""
    num_images: int

    @property
    def spec(self) -> PreprocessSpec:
        return PreprocessSpec(**self.config["preprocess"])

    @cached_property
    def reference(self) -> Reference:
        """What the checkpoint says, computed once for all formats."""
        return Reference(self.model, *parity_sample(self))


def export(settings: ExportSettings) -> int:
    """Exports the trained folds of a config, each artifact past the parity gate against its checkpoint.

    Exits with 1 where an artifact fails the gate; it is then not left under its final name.
    """
    check_options(settings, settings.formats)
    wanted = find_formats(settings.formats, settings.precision, settings.device)
    failed, artifacts = 0, []
    print(HEADER)
    for fold, path in find_checkpoints(settings).items():
        source: Source | None = None
        for name, precision in wanted:
            target = target_of(path, fold, name, precision, settings)
            artifact = path.with_name(FORMATS[name].file_name(target))
            artifacts.append(artifact)
            if is_current(artifact, path, target) and not settings.force and not settings.check:
                print(f"{fold:4} {name:12} {precision:5} up to date: {artifact}")
                continue
            source = source or load_source(path, fold, settings)
            failed += not (check_one if settings.check else export_one)(source, target, artifact)
    if settings.triton and not failed:
        print(
            f"Triton: {', '.join(write_repository(settings.triton, artifacts))} in {settings.triton}"
        )
    return 1 if failed else 0


def find_checkpoints(settings: ExportSettings) -> dict[int, Path]:
    """Returns the checkpoint by fold. Raises UserError where there is none."""
    folders = fold_dirs(settings.run_dir)
    found = {k: folder / BEST for k, folder in folders.items() if (folder / BEST).is_file()}
    if settings.fold is not None:
        found = {fold: path for fold, path in found.items() if fold == settings.fold}
    if not found:
        which = "no fold" if settings.fold is None else f"no fold {settings.fold}"
        raise UserError(
            f"{settings.run_dir} has {which} with {BEST}; run `python -m train --config {settings.config}` first"
        )
    return found


def target_of(
    checkpoint: Path, fold: int, name: str, precision: str, settings: ExportSettings
) -> Target:
    """Returns what one artifact of a fold is to be."""
    return Target(
        config=settings.config,
        fold=fold,
        format=name,
        precision=precision,
        device=device_of(name, settings.device),
        spec=PreprocessSpec(**load_checkpoint(checkpoint)["config"]["preprocess"]),
        options=settings,
        cache_dir=checkpoint.parents[1],
    )


def is_current(artifact: Path, checkpoint: Path, target: Target) -> bool:
    """Whether the artifact is whole, and is what the target asks for from this very checkpoint."""
    if not (artifact.is_file() and manifest_path(artifact).is_file()):
        return False
    manifest = read_json(manifest_path(artifact))
    asked = {
        **target.facts,
        "made_from": {"checkpoint": checkpoint.name, "sha256": sha256(checkpoint)},
    }
    same = all(manifest.get(key) == value for key, value in asked.items())
    return same and bool(manifest["sha256"] == sha256(artifact))


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
        raise UserError(
            f"{path} does not fit {trained_with.model} ({str(error).splitlines()[1].strip()})"
        ) from None
    return Source(
        path,
        sha256(path),
        model.eval(),
        config,
        settings.data or trained_with.data,
        settings.parity_images,
    )


def export_one(source: Source, target: Target, artifact: Path) -> bool:
    """Builds one artifact beside its final name, gates it, and moves it there. Returns whether it passed."""
    candidate = artifact.with_name(f".candidate-{artifact.name}")
    target = replace(
        target, calibration=partial(calibration_sample, source, target.options.calibration_images)
    )
    manifest = {**source.config, **target.facts}
    try:
        started = time.perf_counter()
        manifest |= FORMATS[target.format].build(source.model, target, candidate)
        seconds = time.perf_counter() - started
        parity = gate(source, target, candidate, manifest)
        manifest_path(artifact).unlink(missing_ok=True)
        candidate.replace(artifact)
    except ParityError as error:
        fail(artifact, manifest, error)
        return False
    finally:
        with contextlib.suppress(OSError):  # a folder that cannot be written has been told of
            candidate.unlink(missing_ok=True)
    manifest["made_from"] = {"checkpoint": source.path.name, "sha256": source.sha256}
    publish(
        artifact,
        {**manifest, "build_seconds": round(seconds, 1), "versions": versions(*PACKAGES)},
        parity,
    )
    return True


def check_one(source: Source, target: Target, artifact: Path) -> bool:
    """Gates an artifact that is there, on this machine. Returns whether it passed."""
    manifest = read_manifest(artifact)
    if manifest["made_from"]["sha256"] != source.sha256:
        raise UserError(
            f"{artifact} was made from another checkpoint than {source.path}; export it again"
        )
    try:
        publish(artifact, manifest, gate(source, target, artifact, manifest))
    except ParityError as error:
        fail(artifact, manifest, error)
        return False
    return True


def gate(
    source: Source, target: Target, path: Path, manifest: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the parity figures of an artifact and the CPU they are of, None if it cannot run here.

    Raises:
        ParityError: it does not say what its checkpoint says.
        UserError: its engine does not work here.
    """
    if FORMATS[target.format].portable and unavailable_reason(target.format, target.device):
        return None
    ungated = {
        key: value for key, value in manifest.items() if key != "parity"
    }  # or its engine refuses it
    engine = create(path, ungated, target.device)
    tolerance = TOLERANCES[target.precision]
    figures = check_parity(source.reference, engine, tolerance, target.batch_sizes)
    cpu = {
        "architecture": platform.machine(),
        "processor": processor(),
        "features": cpu_features(),
    }
    return {**figures, "cpu": cpu}


def publish(artifact: Path, manifest: dict[str, Any], parity: dict[str, Any] | None) -> None:
    """Writes the manifest of an artifact that is in its place, and says so."""
    manifest = {**manifest, "parity": parity}
    write_manifest(
        artifact,
        **{key: value for key, value in manifest.items() if key not in ("artifact", "sha256")},
    )
    megabytes = artifact.stat().st_size / 1e6
    start = (
        f"{manifest['fold']:4} {manifest['format']:12} {manifest['precision']:5} {megabytes:7.1f}"
    )
    seconds = f"{manifest['build_seconds']:8.1f}"
    if parity is None:
        print(
            f"{start} {seconds} {'not gated: --check does it on a machine that runs it':>32}  {artifact}"
        )
        return
    record(artifact, {"passed": True, **parity})
    worst = summary(parity)
    print(
        f"{start} {seconds} {worst['cosine']:10.7f} {worst['max_logit_error']:12.1e} {worst['rank_correlation']:8.5f}  "
        f"{artifact}"
    )


def summary(parity: Mapping[str, Any]) -> dict[str, float]:
    """Returns the worst of the parity figures over all batch sizes."""
    figures = [figure for name, figure in parity.items() if name.startswith("batch_")]
    return {
        "cosine": min(figure["cosine"] for figure in figures),
        "max_logit_error": max(figure["max_logit_error"] for figure in figures),
        "rank_correlation": parity.get("rank_correlation", float("nan")),
    }


def record(artifact: Path, result: dict[str, Any]) -> None:
    """Notes in `parity.json` how an artifact of this folder did at the gate."""
    path = artifact.with_name(PARITY_FILE)
    results = read_json(path) if path.is_file() else {}
    write_json(path, {**results, artifact.name: result})


def fail(artifact: Path, manifest: Mapping[str, Any], error: ParityError) -> None:
    """Takes an artifact that failed the gate away and says why."""
    artifact.unlink(missing_ok=True)
    manifest_path(artifact).unlink(missing_ok=True)
    record(artifact, {"passed": False, "reason": str(error)})
    print(
        f"{manifest['fold']:4} {manifest['format']:12} {manifest['precision']:5} failed the parity gate: {error}"
    )


def parity_sample(source: Source) -> tuple[Pixels, NDArray[np.float32]]:
    """Returns images of the fold's held-out rows, by inference's own decoder, and their targets.

    Returns:
        uint8 [R, size, size, 3], float32 [R]; R is `source.num_images` or what the fold has.

    Raises:
        UserError: none can be read.
    """
    images, target = read_sample(source, source.num_images, held_out=True)
    if not len(images):
        raise UserError(
            f"no image of fold {source.config['fold']} in {source.data} can be read; give --data"
        )
    return images, target


def calibration_sample(source: Source, num_images: int) -> Pixels:
    """Returns at most `num_images` of the fold's training images, uint8 [R, size, size, 3], R perhaps 0.

    The held-out ones are for the gate, which is to judge what calibration has not seen.
    """
    return read_sample(source, num_images, held_out=False)[0]


def read_sample(
    source: Source, num_images: int, held_out: bool
) -> tuple[Pixels, NDArray[np.float32]]:
    """Returns images and targets of rows that the fold holds out, or of those that it trains on.

    A quarter at most are positives, as far as there are any; the others are spread over the table.
    """
    dataset = Dataset(source.data)
    table = dataset.metadata("train")
    fold = read_folds(source.path.parents[1] / FOLDS_FILE).of(table)
    table = table.filter((fold == source.config["fold"]) == held_out)
    store = dataset.images("train")
    table = table.filter(~pl.col(schema.ID).is_in(store.missing(table[schema.ID].to_list())))
    positives, negatives = (table.filter(pl.col(schema.TARGET) == target) for target in (1, 0))
    rows = pl.concat([every(positives, num_images // 4), every(negatives, num_images)]).head(
        num_images
    )
    images = np.empty((len(rows), source.spec.size, source.spec.size, 3), np.uint8)
    with decode_pool(1) as pool:
        failed = store.decode(rows[schema.ID].to_list(), source.spec, images, pool)
    good = [row for row in range(len(rows)) if row not in failed]
    return images[good], rows[schema.TARGET].cast(pl.Float32).to_numpy()[good]


def every(table: pl.DataFrame, count: int) -> pl.DataFrame:
    """Returns at most `count` rows, at even distances."""
    return (
        table.gather_every(max(1, ceil_div(len(table), max(count, 1)))) if count else table.clear()
    )
