"""Exports the folds of a trained config, or a backbone: build, check parity, publish."""

import contextlib
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from export.backbone import (
    begin_backbone,
    describe_backbone,
    open_backbone,
    refuse_other_content,
    synthetic_sample,
)
from export.formats import (
    FORMATS,
    TOLERANCES,
    ArtifactSpec,
    BuildInputs,
    build_artifact,
    build_device,
    check_options,
    file_name,
    find_formats,
)
from export.options import ExportSettings
from export.parity import ParityError, Reference, check_parity, worst_figures
from export.triton import write_repository
from infer.engines import create, unavailable_reason
from infer.trust import refuse_untrusted, remember
from isic import schema
from isic.dataset import Dataset
from isic.folds import read_folds
from isic.layout import (
    ALL,
    BEST_CHECKPOINT,
    FOLDS_FILE,
    NONE,
    REMOTE_DATASET,
    Fold,
    fold_dir,
    fold_files,
    fold_name,
)
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.arithmetic import ceil_div
from isic.runtime.errors import UserError
from isic.runtime.fields import Count, Fields, Index, check_fields
from isic.runtime.files import (
    manifest_path,
    read_json,
    read_manifest,
    rename,
    sha256,
    sync,
    versions,
    write_json,
)
from isic.runtime.machine import cpu_features, processor
from isic.runtime.only_writer import only_writer
from isic.runtime.progress import TimeLeft
from isic.runtime.remote import fetch
from isic.views import VIEWS
from train.checkpoint import checkpoint_settings, load_checkpoint
from train.model import Classifier, create_model

PARITY_FILE = "parity.json"
BUILD_PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")
"""Packages that any build may use; a manifest has their versions."""
HEADER = "fold format       types      MB  seconds     cosine  logit error     rank  artifact"


@dataclass(frozen=True)
class Source:
    """A fold's checkpoint or a backbone, loaded."""

    folder: Path
    """The folder of the artifacts, which is in that of the run."""
    made_from: Mapping[str, str]
    """The entry of a manifest that names the checkpoint or the weights, with their digest."""
    model: Classifier
    config: dict[str, Any]
    """Name, fold, features, preprocessing and so on, as the manifest will have them."""
    data: Path | None
    """The dataset of the parity check; None for synthetic images."""
    num_images: int
    """The number of images in the parity check."""
    tta: str
    """The views that all artifacts of a command average over."""

    @property
    def preprocess(self) -> PreprocessSpec:
        return PreprocessSpec(**self.config["preprocess"])

    @property
    def name(self) -> str:
        """The checkpoint's path, or the backbone's model."""
        checkpoint = self.made_from.get("checkpoint")
        return str(self.folder / checkpoint) if checkpoint else str(self.config["model"])

    @property
    def images(self) -> str:
        """The kind of the parity check's images."""
        if self.config["fold"] == NONE:
            return "of --data" if self.data else "synthetic"
        return "training" if self.config["fold"] == ALL else "held out"

    @cached_property
    def reference(self) -> Reference:
        """The network's own outputs, computed once for all formats."""
        images, labels = parity_sample(self)
        return Reference(self.model, images, labels, self.tta)


@dataclass(frozen=True)
class Checkpoint:
    """A fold's checkpoint, not loaded."""

    path: Path
    fold: Fold
    settings: ExportSettings

    @property
    def folder(self) -> Path:
        return self.path.parent

    @cached_property
    def made_from(self) -> dict[str, str]:
        return made_from_checkpoint(self.path, sha256(self.path))

    def load(self) -> Source:
        """Load it. Raise UserError as `load_source` does."""
        return load_source(self.path, self.made_from["sha256"], self.fold, self.settings)


Networks = dict[Fold, Checkpoint | Source]
"""The networks to export by fold, or the backbone at NONE."""


def made_from_checkpoint(path: Path, digest: str) -> dict[str, str]:
    """Return the entry of a manifest that names a checkpoint with its SHA-256."""
    return {"checkpoint": path.name, "sha256": digest}


def export(settings: ExportSettings) -> int:
    """Run `python -m export`, which its settings describe. Return the exit code."""
    check_options(settings, settings.formats)
    wanted = find_formats(settings.formats, settings.precision, settings.device)
    num_failed = 0
    artifacts: list[Path] = []
    networks = find_backbone(settings) if settings.model else find_checkpoints(settings)
    announce_export(settings, networks, wanted)
    time_left = TimeLeft(len(networks), "check" if settings.check else "export")
    print(HEADER, flush=True)
    for fold, network in networks.items():
        specs = [artifact_spec(fold, name, precision, settings) for name, precision in wanted]
        artifacts += [network.folder / file_name(spec) for spec in specs]
        num_failed += export_fold(network, specs, settings)
        time_left.advance()
    if settings.triton and not num_failed:
        names = write_repository(settings.triton, artifacts)
        print(f"Triton: {', '.join(names)} in {settings.triton}")
    return 1 if num_failed else 0


def announce_export(
    settings: ExportSettings, networks: Networks, wanted: list[tuple[str, str]]
) -> None:
    """Print one line on the artifacts that are about to be made."""
    formats = ", ".join(
        f"{name} {precision} for the {build_device(name, settings.device).upper()}"
        for name, precision in wanted
    )
    verb = "checking" if settings.check else "exporting"
    views = len(VIEWS[settings.tta])
    mean = f", the mean over {views} views" if views > 1 else ""
    names = f"fold{'s' * (len(networks) > 1)} {', '.join(map(str, networks))}"
    source = networks.get(NONE)
    if isinstance(source, Source):
        names = describe_backbone(source.config)
    print(f"{verb} {settings.run_name}: {names}, {formats}{mean}")
    if ALL in networks:
        print(f"parity on training images, because fold {ALL} holds none out")
    if isinstance(source, Source) and not source.data:
        print("parity on synthetic images; --data names a dataset of real ones")


def export_fold(
    network: "Checkpoint | Source", specs: list[ArtifactSpec], settings: ExportSettings
) -> int:
    """Export the artifacts of one fold or backbone, or with `--check` only check them.

    Returns:
        The number of artifacts that failed the parity check.
    """
    process = partial(check_one, trust=settings.trust) if settings.check else export_one
    num_failed = 0
    for spec in specs:
        artifact = network.folder / file_name(spec)
        redo = settings.force or settings.check
        if not redo and is_current(artifact, spec, network.made_from):
            print(f"{label(vars(spec))} up to date: {artifact}")
            continue
        # Loaded once, and only if needed: a checkpoint takes seconds to unpickle.
        if isinstance(network, Checkpoint):
            network = network.load()
        with only_writer(artifact):
            num_failed += not process(network, spec, artifact)
    return num_failed


def find_backbone(settings: ExportSettings) -> Networks:
    """Build the backbone of `--model` and prepare its folder, unless it is only checked.

    Raises:
        UserError: it cannot be built, or the folder holds something else.
    """
    if settings.triton:
        raise UserError("--triton is for networks with a lesion head; leave it out with --model")
    backbone = open_backbone(settings)
    run = settings.run_dir
    refuse_other_content(run, backbone, settings.force)
    config = backbone.config if settings.check else begin_backbone(run, backbone)
    source = Source(
        fold_dir(run, NONE),
        backbone.made_from,
        backbone.model,
        config,
        settings.data,
        settings.parity_images,
        settings.tta,
    )
    return {NONE: source}


def find_checkpoints(settings: ExportSettings) -> Networks:
    """Return the checkpoint of each fold to export. Raise UserError if there is none."""
    found = fold_files(settings.run_dir, BEST_CHECKPOINT, settings.fold)
    if not found:
        which, flag = "no fold", ""
        if settings.fold is not None:
            which, flag = f"no {fold_name(settings.fold)}", f" --fold {settings.fold}"
        raise UserError(
            f"{settings.run_dir} has {which} with {BEST_CHECKPOINT}; run "
            f"`python -m train --config {settings.config}{flag}` first"
        )
    return {fold: Checkpoint(path, fold, settings) for fold, path in found.items()}


def artifact_spec(
    fold: Fold, format_name: str, precision: str, settings: ExportSettings
) -> ArtifactSpec:
    return ArtifactSpec(
        config=settings.run_name,
        fold=fold,
        format=format_name,
        precision=precision,
        device=build_device(format_name, settings.device),
        options=settings,
    )


def is_current(artifact: Path, spec: ArtifactSpec, made_from: Mapping[str, str]) -> bool:
    """Return whether an artifact is intact, made from this network, and matches the spec."""
    if not (artifact.is_file() and manifest_path(artifact).is_file()):
        return False
    # Manifests of earlier versions lack `tta`, and their artifacts have no views.
    manifest = {"tta": "none", **read_json(manifest_path(artifact))}
    wanted = {**spec.facts, "made_from": made_from}
    if any(manifest.get(key) != value for key, value in wanted.items()):
        return False
    # Last, because it reads the whole file.
    return bool(manifest["sha256"] == sha256(artifact))


class ConfigFields(Fields):
    """The fields of a checkpoint's config that the manifests of its artifacts will have."""

    name: str
    fold: Index | Literal["all", "none"]
    num_features: Count
    preprocess: PreprocessSpec
    aux: dict[str, str] = Field({})


def load_source(path: Path, digest: str, fold: Fold, settings: ExportSettings) -> Source:
    """Load a checkpoint, whose SHA-256 is `digest`, into its model.

    Raises:
        UserError: it is of another config or fold, or its weights do not fit its model.
    """
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    check_fields(path, config, ConfigFields, "train this fold again")
    if (config["name"], config["fold"]) != (settings.config, fold):
        raise UserError(
            f"{path} is fold {config['fold']} of {config['name']}, not fold {fold} of "
            f"{settings.config}; give the --config and --model_dir that belong together"
        )
    trained_with = checkpoint_settings(path, checkpoint)
    data = settings.data or trained_with.data
    fetch(data, REMOTE_DATASET)
    # Its mean and std are part of the network, and another timm may have other ones.
    spec = PreprocessSpec(**config["preprocess"])
    model = create_model(trained_with, pretrained=False, spec=spec)
    try:
        model.load_state_dict(checkpoint["model_state_dict"])
    except RuntimeError as error:
        mismatch = str(error).splitlines()[1].strip()  # the first line only names the class
        raise UserError(f"{path} does not fit {trained_with.model} ({mismatch})") from None
    return Source(
        path.parent,
        made_from_checkpoint(path, digest),
        model.eval(),
        config,
        data,
        settings.parity_images,
        settings.tta,
    )


def export_one(source: Source, spec: ArtifactSpec, artifact: Path) -> bool:
    """Build one artifact and publish it if it passes the parity check. Return whether it does."""
    # Under a temporary name until then: no engine may load an artifact that was not checked.
    candidate = artifact.with_name(f".candidate-{artifact.name}")
    manifest = {**source.config, **spec.facts}
    try:
        started = time.perf_counter()
        manifest |= build_artifact(spec, build_inputs(source, spec), candidate)
        seconds = time.perf_counter() - started
        parity = measure_parity(source, spec, candidate, manifest)
        # The old manifest goes first: an artifact must never be next to the manifest of another.
        manifest_path(artifact).unlink(missing_ok=True)
        sync(candidate)
        rename(candidate, artifact)
    except ParityError as error:
        remove_failed(artifact, manifest, error)
        return False
    finally:
        with contextlib.suppress(OSError):  # a read-only folder has already raised a UserError
            candidate.unlink(missing_ok=True)
    manifest["made_from"] = source.made_from
    manifest["build_seconds"] = round(seconds, 1)
    manifest["versions"] = versions(*BUILD_PACKAGES, *FORMATS[spec.format].packages)
    manifest = {"artifact": artifact.name, "sha256": sha256(artifact), **manifest}
    publish(artifact, manifest, parity)
    return True


def build_inputs(source: Source, spec: ArtifactSpec) -> BuildInputs:
    return BuildInputs(
        model=source.model,
        preprocess=source.preprocess,
        cache_dir=source.folder.parent,
        calibration=partial(calibration_sample, source, spec.options.calibration_images),
        aux=tuple(source.config.get("aux", ())),
    )


def check_one(source: Source, spec: ArtifactSpec, artifact: Path, trust: bool) -> bool:
    """Check the parity of an existing artifact on this machine. Return whether it passes."""
    manifest = read_manifest(artifact)
    if manifest["made_from"]["sha256"] != source.made_from["sha256"]:
        raise UserError(
            f"{artifact} was made from other weights than those of {source.name}; export it again"
        )
    refuse_untrusted({artifact: manifest}, trust)
    try:
        parity = measure_parity(source, spec, artifact, manifest)
    except ParityError as error:
        remove_failed(artifact, manifest, error)
        return False
    publish(artifact, manifest, parity)
    return True


def measure_parity(
    source: Source, spec: ArtifactSpec, path: Path, manifest: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return an artifact's parity figures and the CPU they are of, None if it cannot run here.

    Raises:
        ParityError: it does not reproduce its checkpoint's outputs.
        UserError: its engine does not work here.
    """
    if FORMATS[spec.format].portable and unavailable_reason(spec.format, spec.device):
        return None
    # An engine refuses an artifact whose manifest records that its parity is unchecked.
    unchecked = {key: value for key, value in manifest.items() if key != "parity"}
    engine = create(path, unchecked, spec.device)
    figures = check_parity(source.reference, engine, TOLERANCES[spec.precision], spec.batch_sizes)
    cpu = {
        "architecture": platform.machine(),
        "processor": processor(),
        "features": cpu_features(),
    }
    return {**figures, "images": source.images, "cpu": cpu}


def publish(artifact: Path, manifest: dict[str, Any], parity: dict[str, Any] | None) -> None:
    """Write the manifest and the parity record of an artifact that has its name, and print it.

    Args:
        manifest: with the artifact's `sha256`.
    """
    remember([manifest])
    if parity is not None:
        record_parity(artifact, {"passed": True, **parity})
    # Last of all: an artifact with a manifest is not made again.
    fields = {**manifest, "artifact": artifact.name, "parity": parity}
    write_json(manifest_path(artifact), fields)
    megabytes = artifact.stat().st_size / 1e6
    start = f"{label(manifest)} {megabytes:7.1f} {manifest['build_seconds']:8.1f}"
    if parity is None:
        note = "not checked: run --check on a GPU"
        print(f"{start} {note:>32}  {artifact}")
        return
    worst = worst_figures(parity)
    error = figure(worst["max_logit_error"], ".1e")
    rank = figure(worst["rank_correlation"], ".5f")
    print(f"{start} {worst['cosine']:10.7f} {error:>12} {rank:>8}  {artifact}")


def figure(value: float, form: str) -> str:
    """Return a figure as text, a dash for nan."""
    return "-" if math.isnan(value) else format(value, form)


def record_parity(artifact: Path, result: dict[str, Any]) -> None:
    """Record the parity check of an artifact in its folder's `parity.json`."""
    path = artifact.with_name(PARITY_FILE)
    results = read_json(path) if path.is_file() else {}
    write_json(path, {**results, artifact.name: result})


def remove_failed(artifact: Path, manifest: Mapping[str, Any], error: ParityError) -> None:
    """Remove an artifact that failed the parity check; record and print the reason."""
    artifact.unlink(missing_ok=True)
    manifest_path(artifact).unlink(missing_ok=True)
    record_parity(artifact, {"passed": False, "reason": str(error)})
    print(f"{label(manifest)} failed the parity check: {error}")


def label(facts: Mapping[str, Any]) -> str:
    """Return the start of a line on an artifact: its `fold`, `format` and `precision`."""
    return f"{facts['fold']!s:>4} {facts['format']:12} {facts['precision']:5}"


def parity_sample(source: Source) -> tuple[Pixels, NDArray[np.float32]]:
    """Return at most `source.num_images` that the fold holds out, and their labels.

    ALL holds none out: they are those that fold 0 of the same plan holds out. Of a backbone they
    are every other image of the dataset, or synthetic ones.

    Returns:
        uint8 [R, size, size, 3] and float32 [R].

    Raises:
        UserError: none can be read.
    """
    images, labels = read_sample(source, source.num_images, for_parity=True)
    if not len(images):
        raise UserError(
            f"no image of fold {source.config['fold']} in {source.data} can be read; give --data"
        )
    return images, labels


def calibration_sample(source: Source, num_images: int) -> Pixels:
    """Return at most `num_images` of the fold's training images, uint8 [R, size, size, 3].

    Of a backbone they are the images that the parity check leaves.
    """
    # Not those of the parity check, which must not judge images of the calibration.
    return read_sample(source, num_images, for_parity=False)[0]


def read_sample(
    source: Source, num_images: int, for_parity: bool
) -> tuple[Pixels, NDArray[np.float32]]:
    """Return images and labels of the fold's rows of the parity check, or of the other rows."""
    if source.data is None:
        images = synthetic_sample(source.preprocess, num_images, seed=int(for_parity))
        return images, np.zeros(len(images), np.float32)
    dataset = Dataset(source.data)
    table = dataset.metadata("train")
    table = table.filter(parity_rows(source, table) == for_parity)
    store = dataset.images("train")
    table = table.filter(~pl.col(schema.ID).is_in(store.missing(table[schema.ID].to_list())))
    rows = choose_rows(table, num_images)
    images, failed = store.load(rows[schema.ID].to_list(), source.preprocess)
    good = [row for row in range(len(rows)) if row not in failed]
    labels = rows[schema.TARGET].cast(pl.Float32).to_numpy()
    return images[good], labels[good]


def parity_rows(source: Source, table: pl.DataFrame) -> pl.Series:
    """Return whether each row may be in the parity check, [N]; calibration takes the others."""
    fold = source.config["fold"]
    if fold == NONE:
        return pl.Series(np.arange(len(table)) % 2 == 0)
    folds = read_folds(source.folder.parent / FOLDS_FILE).of(table)
    return folds == (0 if fold == ALL else fold)


def choose_rows(table: pl.DataFrame, num_rows: int) -> pl.DataFrame:
    """Return rows spread evenly over the table; at most a quarter are positives."""
    positives = table.filter(pl.col(schema.TARGET) == 1)
    negatives = table.filter(pl.col(schema.TARGET) == 0)
    # Positives are rare, but the pAUC needs some.
    chosen = [evenly_spaced(positives, num_rows // 4), evenly_spaced(negatives, num_rows)]
    return pl.concat(chosen).head(num_rows)


def evenly_spaced(table: pl.DataFrame, count: int) -> pl.DataFrame:
    """Return at most `count` rows at equal distances."""
    if not count:
        return table.clear()
    return table.gather_every(max(1, ceil_div(len(table), count)))
