"""`python -m infer embed`: features and logits of every image, by the engines of every fold that should see it."""

import json
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import polars as pl
from pydantic import AliasChoices, Field, model_validator

from infer.embedding.embedder import Embedder, Job
from infer.embedding.plan import Models, Part, begin, complete, find_models, plan_parts
from infer.embedding.progress import Tally
from infer.embedding.ray_runner import run_ray
from infer.embedding.workers import run_processes
from infer.embeddings import (
    ERRORS,
    ERRORS_FILE,
    PLAN_FILE,
    PLAN_KEY,
    RUN_FILE,
    fold_dir,
    ids_digest,
)
from infer.engines import device_of
from infer.engines.registry import ENGINE_FORMATS
from isic.dataset import SPLITS, Dataset, Split, refuse_dataset
from isic.folds import FILE as FOLDS_FILE
from isic.folds import Folds, fold_dirs, read_folds
from isic.metadata import read_ids
from isic.provenance import SEEN_FILE
from isic.runtime.config import Settings
from isic.runtime.errors import UserError, warn
from isic.runtime.files import (
    atomic_path,
    digest,
    holds,
    read_json,
    refuse_foreign,
    sha256,
    versions,
    write_json,
    write_parquet,
)
from isic.runtime.interrupt import Interrupted, interruptible
from isic.runtime.machine import processor

BATCH_CPU, BATCH_GPU = 64, 256
"""Several images for each core of a large CPU, which takes them one by one; enough to fill a GPU."""
PACKAGES = ("onnxruntime-gpu", "onnxruntime", "opencv-python-headless", "numpy", "polars")


class EmbedSettings(Settings):
    """What `python -m infer embed` takes."""

    config: str = Field(
        validation_alias=AliasChoices("config", "model_config"),
        description="name of the model config (--model_config)",
    )
    data: Path = Field(
        Path("data/isic-2024"), description="dataset folder in the challenge's layout"
    )
    model_dir: Path | None = Field(
        None, description="run with exported folds; outputs/<config> if not given"
    )
    output_dir: Path = Field(
        Path("outputs/embeddings"), description="embeddings land in <output_dir>/<config>"
    )
    split: Literal["train", "test", "all"] = Field(
        "all", description="which images; all: what the dataset has"
    )
    folds: Literal["oof", "all"] = Field(
        "oof",
        description="train images by the fold that did not see them, or by all; test images always by all",
    )
    tta: Literal["none", "flips", "d4"] = Field(
        "none",
        description="average over the image's flips (4 views), or its flips and quarter turns (8)",
    )
    engine: str = Field(
        "model.onnx",
        description="the exported engine of each fold: a format (onnx, aoti, tensorrt) or a file name",
    )
    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"] | None = Field(
        None, description="which one, where a format has several"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="what the engines run on; auto: a GPU if one can be used"
    )
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="type in which features are stored"
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description=f"images a call of the engine; {BATCH_CPU} on a CPU, {BATCH_GPU} on a GPU if not given",
    )
    num_threads: int | None = Field(
        None, ge=1, description="decoding threads of a process; one a core if not given"
    )
    depth: int | None = Field(
        None, ge=2, description="batches decoded ahead; what keeps the threads busy if not given"
    )
    num_processes: int = Field(
        1, ge=1, description="processes on this machine, each with its GPU and its cores"
    )
    ray: str | None = Field(
        None, description="address of a Ray cluster, or local: an actor a GPU embeds the parts"
    )
    on_error: Literal["raise", "skip"] = Field(
        "skip", description="an image that is absent or does not decode"
    )
    max_bad: float = Field(
        0.01, ge=0, le=1, description="share of skipped images above which the run stops"
    )
    quiet: bool = Field(False, description="no progress bar")
    force: bool = Field(
        False, description="replace embeddings that were made with other engines or data"
    )

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.config

    @model_validator(mode="after")
    def _one_way_to_run(self) -> "EmbedSettings":
        if self.ray and self.num_processes > 1:
            raise ValueError(
                "--ray decides itself how many processes there are; leave out --num_processes"
            )
        if self.precision and self.engine not in ENGINE_FORMATS:
            raise ValueError(
                f"--precision chooses among a format's engines; add --engine onnx, not {self.engine}"
            )
        return self


def embed(settings: EmbedSettings) -> int:
    """Embeds the dataset's images with the exported folds of a model config.

    Parts that exist are kept, so a run that was interrupted goes on where it stopped.
    """
    try:
        with interruptible():
            embed_splits(settings)
    except Interrupted as stop:
        print(f"stopped by {stop}; the same command goes on where it stopped", file=sys.stderr)
        return stop.exit_code
    return 0


def embed_splits(settings: EmbedSettings) -> None:
    """Embeds one split or all that the dataset has."""
    dataset = Dataset(settings.data)
    model_dir = settings.model_dir or Path("outputs") / settings.config
    models = find_models(model_dir, settings.config, settings.engine, settings.precision)
    if without := sorted(fold_dirs(model_dir).keys() - set(models.folds)):
        names = ", ".join(f"fold_{k}" for k in without)
        print(
            f"note: {names} in {model_dir} has no such engine; images that it held out are left out"
        )
    settings = settings.model_copy(update={"device": choose_device(models, settings)})
    for split in present_splits(dataset) if settings.split == "all" else [settings.split]:
        embed_split(dataset, split, models, model_dir / FOLDS_FILE, settings)


def choose_device(models: Models, settings: EmbedSettings) -> str:
    """Return the device of all processes; with Ray `auto` stays, for its nodes are other machines."""
    manifests = models.manifests.values()
    if settings.ray:
        return settings.device
    device = device_of(next(iter(manifests)), settings.device)
    for manifest in manifests if device == "cpu" else ():
        warn_of_other_cpu(manifest)
    return device


def warn_of_other_cpu(manifest: Mapping[str, Any]) -> None:
    """Warn if an int8 artifact passed the parity gate on another kind of CPU.

    Its products are exact on every CPU, but ARM's libraries may choose other scales for activations.
    """
    checked_on = ((manifest.get("parity") or {}).get("cpu") or {}).get("architecture")
    here = platform.machine()
    if manifest.get("precision") == "int8" and checked_on not in {None, here}:
        warn(
            f"fold {manifest['fold']} in int8 was checked on {checked_on}, this is {here}; "
            f"run `python -m export --config {manifest['name']} --precision int8 --check` here",
        )


def check_folds(models: Models, folds: Folds) -> None:
    """Raises a UserError where an engine was trained by another fold plan than the one that lies with it."""
    ours = folds.digest
    for fold, manifest in models.manifests.items():
        if manifest.get("folds_digest", ours) != ours:
            raise UserError(
                f"{models.artifacts[fold]} was trained with the fold plan {manifest['folds_digest']}, beside it is "
                f"{ours}; export it again from its own run"
            )


def present_splits(dataset: Dataset) -> list[Split]:
    """Returns the splits of a dataset that have a table and images."""
    found = [
        split
        for split in SPLITS
        if dataset.metadata_path(split).is_file() and dataset.find_images(split)
    ]
    if not found:
        raise UserError(
            f"{dataset.root} has no split with both a table and images; run `python -m isic check`"
        )
    return found


def embed_split(
    dataset: Dataset, split: Split, models: Models, folds_path: Path, settings: EmbedSettings
) -> None:
    """Embeds one split and writes its `run.json`."""
    directory = settings.run_dir.resolve() / split
    plan, parts = draw_up(dataset, split, models, folds_path, settings)
    refuse_dataset(directory.parent, "--output_dir")
    if split == "train":
        refuse_other_folds(directory.parent, folds_path)
    begin(directory, plan, settings.force)
    if split == "train":
        carry_over(models, folds_path, directory.parent)
    tally = Tally(parts, settings.on_error, settings.max_bad, settings.quiet)
    if not tally.num_now and (directory / RUN_FILE).is_file():
        print(
            f"up to date config={settings.config} split={split} output={settings.run_dir / split}"
        )
        return
    with tally:
        complete(parts, runner(job_of(dataset, split, models, settings, plan), settings, tally))
    bad = gather_errors(directory, parts)
    counts = {
        "num_images": sum(map(len, parts)) - bad,
        "num_bad": bad,
        "embedded_now": tally.num_now,
    }
    machine = {"device": settings.device, "processor": processor()}
    write_json(directory / RUN_FILE, {**plan, **counts, **machine, **tally.facts()})
    print(
        f"embedded config={settings.config} split={split} images={counts['num_images']} bad={bad} "
        f"seconds={tally.total_seconds:.1f} images_per_second={tally.num_now / tally.total_seconds:.0f} "
        f"bound_by={tally.bound_by} output={settings.run_dir / split}"
    )


def refuse_other_folds(root: Path, folds_path: Path) -> None:
    """Raise a UserError if the fold plan of something else than embeddings would be replaced by another one."""
    there = root / FOLDS_FILE
    is_own = any(holds(root / split / PLAN_FILE, PLAN_KEY) for split in SPLITS)
    is_same = there.is_file() and sha256(there) == sha256(folds_path)
    refuse_foreign([there], is_own or is_same, "--output_dir")


def carry_over(models: Models, folds_path: Path, root: Path) -> None:
    """Copies the fold plan, and each model's list of the images it has learned from.

    Raises:
        UserError: a list is not the one that the model's manifest names.
    """
    copies = {folds_path: root / FOLDS_FILE}
    for fold, artifact in models.artifacts.items():
        path = artifact.parent / SEEN_FILE
        if path.is_file():
            _check_seen(path, models.manifests[fold])
            copies[path] = fold_dir(root, "train", fold) / SEEN_FILE
    for source, copy in copies.items():
        with atomic_path(copy) as temporary:
            shutil.copyfile(source, temporary)


def _check_seen(path: Path, manifest: Mapping[str, Any]) -> None:
    expected = manifest.get("trained_on")  # earlier versions do not name it
    if expected is not None and expected != sha256(path):
        raise UserError(
            f"{path} is not the list of images that the exported model was trained on; take both "
            "from the same run"
        )


def draw_up(
    dataset: Dataset, split: Split, models: Models, folds_path: Path, settings: EmbedSettings
) -> tuple[dict[str, Any], list[Part]]:
    """Returns all that decides what the parts contain, and the parts; the tables they come from are let go here."""
    folds = read_folds(folds_path)
    check_folds(models, folds)
    ids = read_ids(dataset.metadata_path(split))
    root = settings.run_dir.resolve()
    plan = {
        **run_plan(dataset, split, models, folds, settings),
        "batch_size": settings.batch_size or usual_batch_size(root / split, models, settings),
        "ids_digest": ids_digest(ids),
    }
    plan[PLAN_KEY] = digest(json.dumps(plan))
    return plan, plan_parts(
        root, split, ids, models.folds, folds if split == "train" else None, settings.folds
    )


def usual_batch_size(directory: Path, models: Models, settings: EmbedSettings) -> int:
    """Returns the batch size of a run that goes on, because it is part of what is computed.

    For a new one it is what the engine was built for (`batch_size` in its manifest), or what suits the device.
    """
    plan = directory / PLAN_FILE
    former = read_json(plan).get("batch_size") if plan.is_file() and not settings.force else None
    known = former or models.batch_size
    if known:
        return int(known)
    device = device_of(next(iter(models.manifests.values())), settings.device)
    return BATCH_GPU if device == "cuda" else BATCH_CPU


def run_plan(
    dataset: Dataset, split: Split, models: Models, folds: Folds, settings: EmbedSettings
) -> dict[str, Any]:
    """Returns what a run is made with; it goes on only where this is the same."""
    images = dataset.images(split)
    return {
        "config": settings.config,
        "split": split,
        "folds": models.folds,
        "folds_mode": settings.folds,
        "folds_digest": folds.digest,
        "engines": {str(fold): manifest["sha256"] for fold, manifest in models.manifests.items()},
        "checkpoints": {
            str(k): manifest.get("made_from", manifest)["sha256"]
            for k, manifest in models.manifests.items()
        },
        "preprocess": models.spec.model_dump(mode="json"),
        "tta": settings.tta,
        "dtype": settings.dtype,
        "num_features": models.num_features,
        "metadata_sha256": sha256(dataset.metadata_path(split)),
        "images": {"number": len(images), "sizes": images.sizes_digest()},
        "versions": versions(*PACKAGES),
    }


def job_of(
    dataset: Dataset, split: Split, models: Models, settings: EmbedSettings, plan: Mapping[str, Any]
) -> Job:
    """Returns what each worker needs to know."""
    return Job(
        data=dataset.root.resolve(),
        split=split,
        models=models,
        device=settings.device,
        dtype=settings.dtype,
        tta=settings.tta,
        batch_size=plan["batch_size"],
        num_threads=settings.num_threads,
        depth=settings.depth,
        plan_digest=plan[PLAN_KEY],
    )


def runner(job: Job, settings: EmbedSettings, tally: Tally) -> Callable[[list[Part]], None]:
    """Returns what embeds some parts: this process, several, or a Ray cluster."""

    def run_here(parts: list[Part]) -> None:
        with Embedder(job) as embedder:
            embedder.run(parts, tally.add)

    if settings.ray:
        return partial(run_ray, job=job, address=settings.ray, report=tally.add)
    if settings.num_processes > 1:
        return partial(run_processes, job=job, number=settings.num_processes, report=tally.add)
    return run_here


def gather_errors(directory: Path, parts: list[Part]) -> int:
    """Writes `errors.parquet` from the parts' own and returns how many images it names."""
    bad = [row for part in parts for row in part.bad()]
    write_parquet(directory / ERRORS_FILE, pl.DataFrame(bad, ERRORS, orient="row"))
    return len(bad)
