"""`python -m benchmarks embed`: embedding end to end and its parts, or a whole run."""

import functools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.process import watch_memory
from benchmarks.record import Row, print_and_append
from benchmarks.settings import NULL, EmbedRateSettings
from benchmarks.timing import batches, repeated, seconds_of
from infer.embedding.decoders import Recipe
from infer.embedding.embedder import BatchStats, Embedder, EmbedJob
from infer.embedding.models import Models, find_models
from infer.embedding.settings import BATCH_CPU
from infer.embedding.shards import plan_shards
from infer.embedding.source import Source
from infer.embedding.store import RUN_FILE
from infer.engines import IN_FLIGHT, Pending, create_many, null
from infer.engines.pinned import page_locked
from infer.formats import AUTO
from isic.cache import index_path
from isic.dataset import Dataset
from isic.layout import find_run
from isic.metadata import read_ids
from isic.preprocess import PreprocessSpec
from isic.runtime.errors import UserError
from isic.runtime.files import read_json

WARMUP_IMAGES = 4096
"""Most images of the repeat that is not timed."""

Run = Callable[[pl.Series], None]
"""Does its part of the work for some ids."""


def embed(settings: EmbedRateSettings) -> None:
    """Run `benchmarks embed`, which its settings describe."""
    if settings.formats and (settings.whole or settings.config == NULL):
        raise UserError(
            "--formats is for the untrained network of a config, without --whole; leave it out"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if settings.formats:
            row = _measure_untrained(settings, folder)
            print(f"appended to {print_and_append('embed', [row], settings.results)}")
            return
        if settings.config == NULL:
            model_dir = folder / NULL
            engine = null.NULL_FILE
            metadata = Dataset(settings.data).metadata_path("train")
            null.write_run(model_dir, metadata, PreprocessSpec(size=224))
        else:
            model_dir = find_run(settings.model_dir, settings.config)
            engine = AUTO
        measure = _measure_whole_runs if settings.whole else _measure_parts
        measured = measure(settings, model_dir, engine, folder)
    row = {"what": settings.config, "data": settings.data.name, **measured}
    print(f"appended to {print_and_append('embed', [row], settings.results)}")


def _measure_untrained(settings: EmbedRateSettings, folder: Path) -> Row:
    from benchmarks.artifacts import open_store  # noqa: PLC0415 - the others need no torch
    from benchmarks.untrained import create_untrained  # noqa: PLC0415

    assert settings.formats is not None
    untrained = create_untrained(settings.config)
    with open_store(settings.artifacts) as store:
        artifact = store.get(
            untrained, settings.formats, settings.precision, settings.device, settings.batch
        )
        manifest = {**artifact.manifest, "batch_size": settings.batch}
        models = Models({0: artifact.path.resolve()}, {0: manifest}, untrained.spec)
        what = f"{untrained.settings.name}, {settings.formats} {settings.precision}"
        return {
            "what": what,
            "data": settings.data.name,
            **_measure_models(settings, models, folder),
        }


def _measure_parts(settings: EmbedRateSettings, model_dir: Path, engine: str, folder: Path) -> Row:
    models = _first_fold(find_models(model_dir, settings.config, engine))
    return _measure_models(settings, models, folder)


def _measure_models(settings: EmbedRateSettings, models: Models, folder: Path) -> Row:
    batch_size = models.batch_size or BATCH_CPU
    data = settings.data.resolve()
    job = EmbedJob(
        data,
        "train",
        models,
        settings.device,
        "float16",
        settings.tta,
        batch_size,
        settings.num_threads,
        None,
        settings.decode_in,
    )
    ids = read_ids(Dataset(settings.data).metadata_path("train"))
    ids = pl.Series(repeated(ids.to_list(), settings.images))
    rates = pipeline_rates(job, ids, folder / "parts", settings.repeats)
    share = rates.pop("share")
    rounded = {name: round(rate, 0) for name, rate in rates.items()}
    return {
        "images": len(ids),
        "tta": settings.tta,
        "decode_in": settings.decode_in,
        "num_threads": settings.num_threads,
        **rounded,
        "share": round(share, 3),
    }


def _first_fold(models: Models) -> Models:
    first = min(models.artifacts)
    return Models({first: models.artifacts[first]}, {first: models.manifests[first]}, models.spec)


def _measure_whole_runs(
    settings: EmbedRateSettings, model_dir: Path, engine: str, folder: Path
) -> Row:
    output_dir = folder / "embeddings"
    runs = []
    for _ in range(settings.repeats):
        shutil.rmtree(output_dir, ignore_errors=True)
        cached = index_path(settings.data / "train-image.hdf5")
        if cached:
            cached.unlink(missing_ok=True)  # as before a first run
        # fmt: off
        run = whole_run(
            "--config", settings.config, "--format", engine, "--split", "train",
            "--data", settings.data, "--model_dir", model_dir, "--output_dir", output_dir,
            "--decode_in", settings.decode_in,
        )
        # fmt: on
        runs.append(run)
    last = runs[-1]
    return {
        "images": last["images"],
        "bad": last["bad"],
        "decode_in": settings.decode_in,
        "bound_by": last["bound_by"],
        "seconds": round(statistics.median(run["seconds"] for run in runs), 3),
        "start_seconds": round(statistics.median(run["start_seconds"] for run in runs), 3),
        "peak_mb": max(run["peak_mb"] for run in runs),
    }


def pipeline_rates(
    job: EmbedJob, ids: pl.Series, folder: Path, repeats: int = 5
) -> dict[str, float]:
    """Measure images per second of the pipeline and of its parts, in turns.

    Args:
        job: its batch size and threads are used throughout.
        ids: the images, embedded by every fold of the job.
        folder: for the shards, emptied before each repeat.
        repeats: after one of warm-up, on WARMUP_IMAGES.

    Returns:
        Medians of `ingest`, `engine` and `end_to_end` in images per second, and of `share`: end to
        end divided by the slower of the two parts, within each repeat.
    """
    cases = {
        "ingest": _ingest(job),
        "engine": _engine(job, ids),
        "end_to_end": _end_to_end(job, folder),
    }
    measured: dict[str, list[float]] = {name: [] for name in (*cases, "share")}
    for repeat in range(repeats + 1):
        timed = ids if repeat else ids.head(WARMUP_IMAGES)
        rates = {
            name: len(timed) / seconds_of(functools.partial(run, timed))
            for name, run in cases.items()
        }
        rates["share"] = rates["end_to_end"] / min(rates["ingest"], rates["engine"])
        if repeat:
            for name, rate in rates.items():
                measured[name].append(rate)
    return {name: statistics.median(values) for name, values in measured.items()}


def _ingest(job: EmbedJob) -> Run:
    """Return a function that decodes all batches and drops them."""
    embedder = Embedder.open(job)

    def run(ids: pl.Series) -> None:
        stream = embedder.decode(batches(ids.to_list(), embedder.images_per_batch))
        for batch in stream:
            stream.release(batch)

    return run


def _engine(job: EmbedJob, ids: pl.Series) -> Run:
    """Return a function that keeps the engine busy with the same batch of images."""
    models = job.models
    engine = create_many(models.artifacts, models.manifests, job.device)
    num_views = Recipe(models.spec, job.tta).num_views
    first = ids.head(job.batch_size).to_list()
    loaded, _ = Source(job.data, job.split).open().load(first, models.spec)
    images = page_locked(loaded, engine.device)

    def run(ids: pl.Series) -> None:
        num_rows = len(ids) * num_views
        in_flight: deque[Pending] = deque()
        for start in range(0, num_rows, job.batch_size):
            in_flight.append(engine.submit(images[: num_rows - start]))
            if len(in_flight) == IN_FLIGHT:
                in_flight.popleft().result()
        for pending in in_flight:
            pending.result()

    return run


def _end_to_end(job: EmbedJob, folder: Path) -> Run:
    embedder = Embedder.open(job)
    steps: list[BatchStats] = []

    def run(ids: pl.Series) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        parts = plan_shards(folder, job.split, ids, job.models.folds, None, "all")
        embedder.run(parts, steps.append)

    return run


def whole_run(*flags: object) -> dict[str, Any]:
    """Run `python -m infer embed` with some flags in a process of its own.

    Returns:
        The fields that the run prints last, `seconds` from its start to its end, `start_seconds`
        of them before embedding (Python, libraries, the index of the image file), and `peak_mb` of
        memory in all its processes together.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    started = time.perf_counter()
    command = [sys.executable, "-m", "infer", "embed", *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak_mb = watch_memory(process)
        printed, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    seconds = time.perf_counter() - started
    last_line = printed.splitlines()[-1]
    fields = dict(field.split("=", 1) for field in last_line.split()[1:])
    run = read_json(Path(fields["output"]) / RUN_FILE)
    return {
        **fields,
        "seconds": seconds,
        "start_seconds": seconds - run["seconds"]["total"],
        "peak_mb": max(round(peak_mb), run["peak_memory_mb"]),
    }
