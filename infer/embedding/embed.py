"""`python -m infer embed`: write the features and logits of every image, per fold model."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from infer.embedding.embedder import Embedder, EmbedJob
from infer.embedding.models import Models, choose_device, find_models
from infer.embedding.progress import Progress, Watch
from infer.embedding.ray_runner import run_ray
from infer.embedding.run_spec import (
    RunSpec,
    build_run_spec,
    earlier_engines,
    start_or_resume_split,
)
from infer.embedding.settings import EmbedSettings
from infer.embedding.shards import Shard, plan_shards, run_missing_shards
from infer.embedding.source import Source
from infer.embedding.staging import staged
from infer.embedding.store import (
    BAD_IMAGES_SCHEMA,
    IMAGES,
    RUN_FILE,
    RUN_SPEC_FILE,
    RUN_SPEC_KEY,
    EmbeddedSplit,
)
from infer.embedding.workers import run_processes
from isic.dataset import SPLITS, Dataset, Split, refuse_dataset
from isic.folds import read_folds
from isic.layout import (
    ALL,
    ERRORS_FILE,
    FOLDS_FILE,
    TRAINED_ON_FILE,
    find_run,
    fold_dir,
    fold_dirs,
    fold_name,
)
from isic.provenance import read_seen, rows_seen
from isic.runtime.errors import UserError
from isic.runtime.files import copy_file, holds, refuse_foreign, sha256, write_json
from isic.runtime.interrupt import Interrupted, interruptible
from isic.runtime.machine import processor
from isic.runtime.only_writer import only_writer
from isic.runtime.remote import publish
from isic.runtime.urls import shown
from isic.tables import write_parquet


def embed_dataset(settings: EmbedSettings) -> int:
    """Run `infer embed`, which its settings describe. Return the exit code."""
    try:
        with interruptible():
            embed_splits(settings)
    except Interrupted as stop:
        print(f"stopped by {stop}; the same command resumes the run", file=sys.stderr)
        return stop.exit_code
    return 0


def embed_splits(settings: EmbedSettings, watch: Watch | None = None) -> None:
    """Embed one split, all that the dataset has, or the images of `--images`.

    Args:
        watch: called after each batch; an exception from it ends the run, which can be resumed.
    """
    with staged(settings.run_dir.resolve()):
        _embed_splits(settings, watch)


def _embed_splits(settings: EmbedSettings, watch: Watch | None) -> None:
    model_dir = find_run(settings.model_dir, settings.config)
    models = find_models(
        model_dir,
        settings.config,
        settings.format,
        settings.precision,
        settings.tta,
        settings.device,
        frozenset() if settings.force else earlier_engines(settings.run_dir.resolve()),
        settings.fold,
        settings.trust,
    )
    if models.reason and not settings.quiet:
        print(f"using {models.reason}")
    if settings.fold is None and not settings.images:
        _note_missing_folds(model_dir, models)
    device = choose_device(models, settings.device, uses_ray=settings.ray is not None)
    settings = settings.model_copy(update={"device": device})
    for source in find_sources(settings):
        with only_writer(settings.run_dir / source.split):
            embed_split(source, models, model_dir / FOLDS_FILE, settings, watch)


def find_sources(settings: EmbedSettings) -> list[Source]:
    """Return the images to embed. Raise UserError if there are none."""
    if settings.images:
        return [Source(settings.images, IMAGES)]
    dataset = Dataset(settings.data)
    return [Source(dataset.root, split) for split in wanted_splits(dataset, settings)]


def _note_missing_folds(model_dir: Path, models: Models) -> None:
    missing = [fold for fold in fold_dirs(model_dir) if fold not in models.folds]
    if missing:
        manifest = models.first_manifest
        command = f"python -m export --config {manifest['name']} --formats {manifest['format']}"
        if manifest.get("precision"):
            command += f" --precision {manifest['precision']}"
        names = ", ".join(map(fold_name, missing))
        print(
            f"note: {names} in {model_dir} has no such artifact; train images that it held out are "
            f"not embedded; `{command}` makes it"
        )


def wanted_splits(dataset: Dataset, settings: EmbedSettings) -> list[Split]:
    """Return the splits to embed."""
    if settings.fold == ALL and settings.split == "all":
        return ["test"]
    return present_splits(dataset) if settings.split == "all" else [settings.split]


def present_splits(dataset: Dataset) -> list[Split]:
    """Return the splits of a dataset that have both a table and images."""
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
    source: Source,
    models: Models,
    folds_path: Path,
    settings: EmbedSettings,
    watch: Watch | None = None,
) -> None:
    """Embed one split and write its `run.json`."""
    split = source.split
    root = settings.run_dir.resolve()
    directory = root / split
    output = shown(settings.run_dir / split)
    spec, shards = _plan(source, models, folds_path, settings)
    refuse_dataset(root, "--output_dir")
    if split == "train" and models.holds_out:
        _refuse_other_folds(root, folds_path)
    if split == "train" and settings.fold == ALL:
        _refuse_own_rows(source.data, models)
    start_or_resume_split(directory, spec, settings.force)
    if split == "train":
        copy_provenance(models, folds_path, root)
    progress = Progress(shards, settings.on_error, settings.max_bad, settings.quiet, watch)
    if not progress.num_due and (directory / RUN_FILE).is_file():
        print(f"up to date config={settings.config} split={split} output={output}")
        return
    job = make_job(source, models, settings, spec)
    if not settings.quiet:
        print(announcement(split, progress.num_due, models, job), flush=True)
    with progress:
        run_missing_shards(shards, make_runner(job, settings, progress))
    num_bad = gather_errors(directory, shards)
    counts = {
        "num_images": sum(map(len, shards)) - num_bad,
        "num_bad": num_bad,
        "embedded_now": progress.num_due,
    }
    machine = {"device": settings.device, "processor": processor()}
    # Not in the spec: it follows from the checkpoints, and runs of earlier versions must resume.
    origin = {"pretrained": models.weights}
    write_json(directory / RUN_FILE, {**spec, **origin, **counts, **machine, **progress.summary()})
    publish(directory / RUN_FILE)
    print(
        f"embedded config={settings.config} split={split} images={counts['num_images']} "
        f"bad={num_bad} seconds={progress.total_seconds:.1f} "
        f"images_per_second={progress.num_due / progress.total_seconds:.0f} "
        f"bound_by={progress.bound_by} output={output}"
    )


def announcement(split: EmbeddedSplit, num_images: int, models: Models, job: EmbedJob) -> str:
    """Return one line on the embedding that is about to start."""
    manifest = models.first_manifest
    engine = f"{manifest['format']} {manifest.get('precision', '')}".strip()
    folds = ", ".join(map(str, models.folds))
    kind = "" if split == IMAGES else f"{split} "
    network = f"fold{'s' * (len(models.folds) > 1)} {folds}"
    if models.is_backbone:
        network = f"the backbone {manifest['model']}"
    return (
        f"embedding {num_images:,} {kind}images with {network}: {engine} on {job.device}, "
        f"batches of {job.batch_size}, features as {job.dtype}"
    )


def _plan(
    source: Source, models: Models, folds_path: Path, settings: EmbedSettings
) -> tuple[RunSpec, list[Shard]]:
    """Return the run spec and the shards."""
    # A function of its own so that the full-size tables are freed before the engines are loaded.
    split = source.split
    has_plan = split != IMAGES and not models.is_backbone
    folds = read_folds(folds_path) if split == "train" and models.holds_out else None
    digest = _folds_digest(models, folds_path) if has_plan else None
    ids = source.read_ids()
    spec = build_run_spec(source, models, digest, ids, settings)
    root = settings.run_dir.resolve()
    return spec, plan_shards(root, split, ids, models.folds, folds, settings.folds)


def _folds_digest(models: Models, folds_path: Path) -> str:
    """Return the digest of the fold plan that all models were trained with.

    Without the plan, which only training images need, it is that in the models' manifests.

    Raises:
        UserError: a model was trained with another plan, or its manifest names none.
    """
    expected = models.first_manifest.get("folds_digest")
    if folds_path.is_file():
        expected = read_folds(folds_path).digest
    if expected is None:
        raise UserError(f"{folds_path} is missing; copy it from the folder of the training run")
    refuse_unmatched_folds(models, expected)
    return str(expected)


def refuse_unmatched_folds(models: Models, expected: str) -> None:
    """Raise a UserError if a model was trained with a fold plan of another digest."""
    for fold, manifest in models.manifests.items():
        trained_with = manifest.get("folds_digest", expected)
        if trained_with != expected:
            raise UserError(
                f"{models.artifacts[fold]} was trained with the fold plan {trained_with}, but its "
                f"run has {expected}; export it again from its own run"
            )


def _refuse_other_folds(root: Path, folds_path: Path) -> None:
    """Raise a UserError if another fold plan, not of embeddings, would be overwritten."""
    existing = root / FOLDS_FILE
    is_own = any(holds(root / split / RUN_SPEC_FILE, RUN_SPEC_KEY) for split in SPLITS)
    is_same = existing.is_file() and sha256(existing) == sha256(folds_path)
    refuse_foreign([existing], is_own or is_same, "--output_dir")


def _refuse_own_rows(data: Path, models: Models) -> None:
    """Raise a UserError if the network of all rows has learned from rows of the training table."""
    metadata = Dataset(data).metadata("train")
    for artifact in models.artifacts.values():
        known = rows_seen(metadata, read_seen(artifact.parent / TRAINED_ON_FILE))
        if len(known):
            raise UserError(
                f"{artifact} has learned from {len(known):,} of the {len(metadata):,} training "
                f"rows in {data} or from their patients; leave --split out to embed the test images"
            )


def copy_provenance(models: Models, folds_path: Path, root: Path) -> None:
    """Copy any fold plan, and the list of images that each model was trained on.

    Raises:
        UserError: a list is not the one in the model's manifest.
    """
    copies = {folds_path: root / FOLDS_FILE} if models.holds_out else {}
    for fold, artifact in models.artifacts.items():
        path = artifact.parent / TRAINED_ON_FILE
        if path.is_file():
            _refuse_other_seen(path, models.manifests[fold])
            copies[path] = fold_dir(root / "train", fold) / TRAINED_ON_FILE
    for source, copy in copies.items():
        copy_file(source, copy)
        publish(copy)


def _refuse_other_seen(path: Path, manifest: Mapping[str, Any]) -> None:
    expected = manifest.get("trained_on")  # manifests of earlier versions lack it
    if expected is not None and expected != sha256(path):
        raise UserError(
            f"{path} is not the list of images that the exported model was trained on; take both "
            "from the same run"
        )


def make_job(source: Source, models: Models, settings: EmbedSettings, spec: RunSpec) -> EmbedJob:
    return EmbedJob(
        data=source.data.absolute(),
        split=source.split,
        models=models,
        device=settings.device,
        dtype=settings.dtype,
        tta=models.host_tta(settings.tta),
        batch_size=spec["batch_size"],
        num_threads=settings.num_threads,
        depth=settings.depth,
        decode_in=settings.decode_in,
        run_spec_digest=spec[RUN_SPEC_KEY],
    )


def make_runner(
    job: EmbedJob, settings: EmbedSettings, progress: Progress
) -> Callable[[list[Shard]], None]:
    """Return a function that embeds shards here, in several processes, or on Ray."""
    if settings.ray:
        return partial(run_ray, job=job, address=settings.ray, on_batch=progress.add)
    if settings.num_processes > 1:
        return partial(run_processes, job=job, number=settings.num_processes, on_batch=progress.add)

    def run_here(shards: list[Shard]) -> None:
        with Embedder.open(job) as embedder:
            embedder.run(shards, progress.add)

    return run_here


def gather_errors(directory: Path, shards: list[Shard]) -> int:
    """Write `errors.parquet` from the lists of all shards. Return the number of images in it."""
    bad = [row for shard in shards for row in shard.read_bad()]
    write_parquet(directory / ERRORS_FILE, pl.DataFrame(bad, BAD_IMAGES_SCHEMA, orient="row"))
    publish(directory / ERRORS_FILE)
    return len(bad)
