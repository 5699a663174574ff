"""`python -m benchmarks embed`: embedding end to end beside its parts, and a whole run in a process of its own."""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from pydantic import Field

from benchmarks.record import write
from infer.embedding.embedder import BatchStats, Embedder, EmbedJob
from infer.embedding.models import Models, find_models
from infer.embedding.pipeline import decode_ahead, ring_depth
from infer.embedding.settings import BATCH_CPU
from infer.embedding.shards import plan_shards
from infer.embedding.store import RUN_FILE
from infer.embedding.views import run_averaged
from infer.engines import create, null
from isic.cache import index_path
from isic.dataset import Dataset
from isic.images import decode_pool
from isic.metadata import read_ids
from isic.preprocess import PreprocessSpec
from isic.runtime.config import Settings
from isic.runtime.files import read_json
from isic.runtime.machine import num_cores

STAND_IN = "null"
"""The config that is no model: a stand-in engine that costs nothing shows what the pipeline itself can do."""


class EmbedSettings(Settings):
    """What `python -m benchmarks embed` takes."""

    config: str = Field(
        STAND_IN, description="exported config to embed with; null: a stand-in that costs nothing"
    )
    model_dir: Path | None = Field(
        None, description="the exported run; outputs/<config> if not given"
    )
    data: Path = Field(
        Path("data/isic-2024"), description="dataset folder; its training images are embedded"
    )
    images: int = Field(4000, ge=1, description="images a repeat")
    repeats: int = Field(5, ge=1, description="repeats, of which the median counts")
    whole: bool = Field(
        False, description="instead time `infer embed` of every training image, and its memory"
    )
    results: Path | None = Field(
        None, description="folder of the CSV; benchmarks/results if not given"
    )


def embed(settings: EmbedSettings) -> None:
    """Measures images per second of the ingest alone, the engine of fold 0 alone, and both end to end, in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_dir = settings.model_dir or Path("outputs") / settings.config
        if settings.config == STAND_IN:
            model_dir = folder / STAND_IN
            null.write_run(
                model_dir, Dataset(settings.data).metadata_path("train"), PreprocessSpec(size=224)
            )
        engine = null.NULL_FILE if settings.config == STAND_IN else "model.onnx"
        measured = _whole if settings.whole else _rates
        figures = measured(settings, model_dir, engine, folder)
    row = {"what": settings.config, "data": settings.data.name, **figures}
    print(f"appended to {write('embed', [row], settings.results)}")


def _rates(settings: EmbedSettings, model_dir: Path, engine: str, folder: Path) -> dict[str, Any]:
    found = find_models(model_dir, settings.config, engine)
    first = min(found.artifacts)
    models = Models({first: found.artifacts[first]}, {first: found.manifests[first]}, found.spec)
    batch_size = models.batch_size or BATCH_CPU
    job = EmbedJob(
        settings.data.resolve(), "train", models, "auto", "float16", "none", batch_size, None, None
    )
    ids = read_ids(Dataset(settings.data).metadata_path("train"))[: settings.images]
    measured = rates(job, ids, folder / "parts", settings.repeats)
    return {
        "images": len(ids),
        **{name: round(value, 3 if name == "share" else 0) for name, value in measured.items()},
    }


def _whole(settings: EmbedSettings, model_dir: Path, engine: str, folder: Path) -> dict[str, Any]:
    where = (
        "--data",
        settings.data,
        "--model_dir",
        model_dir,
        "--output_dir",
        folder / "embeddings",
    )
    runs = []
    for _ in range(settings.repeats):
        shutil.rmtree(folder / "embeddings", ignore_errors=True)
        if cached := index_path(settings.data / "train-image.hdf5"):
            cached.unlink(missing_ok=True)  # a first run has none
        runs.append(
            whole_run("--config", settings.config, "--format", engine, "--split", "train", *where)
        )
    return {
        **{key: runs[-1][key] for key in ("images", "bad", "bound_by")},
        **{
            key: round(statistics.median(run[key] for run in runs), 3)
            for key in ("seconds", "start_seconds")
        },
        "peak_mb": max(run["peak_mb"] for run in runs),
    }


def rates(job: EmbedJob, ids: pl.Series, folder: Path, repeats: int = 5) -> dict[str, float]:
    """Measures images per second, each way once a repeat in turns, so that a machine that drifts drifts for all.

    Args:
        job: its batch size and threads are those of every way.
        ids: what to embed by every fold of the job.
        folder: for the parts, emptied before each repeat; not to exist before.
        repeats: of which the median counts, after one to warm up.

    Returns:
        Medians of `ingest`, `engine` and `end_to_end` in images per second, and of `share`: what end to end reaches of
        the slower of the two within each repeat.
    """
    ways = {
        "ingest": _ingest(job, ids),
        "engine": _engine(job, ids),
        "end_to_end": _end_to_end(job, ids, folder),
    }
    measured: dict[str, list[float]] = {name: [] for name in (*ways, "share")}
    for repeat in range(repeats + 1):
        rate = {name: len(ids) / _seconds(run) for name, run in ways.items()}
        rate["share"] = rate["end_to_end"] / min(rate["ingest"], rate["engine"])
        for name, value in rate.items():
            measured[name] += [value] if repeat else []
    return {name: statistics.median(values) for name, values in measured.items()}


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _batches(ids: pl.Series, size: int) -> Iterable[list[str]]:
    return (ids.slice(start, size).to_list() for start in range(0, len(ids), size))


def _ingest(job: EmbedJob, ids: pl.Series) -> Callable[[], None]:
    """The ring of decoded batches, read by nobody who needs time."""
    store, spec, size = Dataset(job.data).images(job.split), job.models.spec, job.batch_size
    num_threads = job.num_threads or num_cores()
    depth = job.depth or ring_depth(size, num_threads)

    def run() -> None:
        with decode_pool(num_threads) as pool:
            for _ in decode_ahead(store, _batches(ids, size), spec, pool, size, depth):
                pass

    return run


def _engine(job: EmbedJob, ids: pl.Series) -> Callable[[], None]:
    models = job.models
    engines = {
        fold: create(path, models.manifests[fold], job.device)
        for fold, path in models.artifacts.items()
    }
    batch = next(iter(_batches(ids, job.batch_size)))
    images = np.empty((len(batch), models.spec.size, models.spec.size, 3), np.uint8)
    Dataset(job.data).images(job.split).decode(batch, models.spec, images)

    def run() -> None:
        for names in _batches(ids, job.batch_size):
            run_averaged(engines, images[: len(names)], job.tta)

    return run


def _end_to_end(job: EmbedJob, ids: pl.Series, folder: Path) -> Callable[[], None]:
    embedder = Embedder(job)
    steps: list[BatchStats] = []

    def run() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        embedder.run(
            plan_shards(folder, job.split, ids, job.models.folds, None, "all"), steps.append
        )

    return run


def whole_run(*flags: object) -> dict[str, Any]:
    """Runs `python -m infer embed` with some flags in a process of its own.

    Returns:
        `seconds` from its start to its end, `start_seconds` of them for all but embedding (Python, libraries, the
        index of the image file), `peak_mb` of memory as it says itself (what the system says of a process counts what
        its parent held when it was started), and what the last line says of the run.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    started = time.perf_counter()
    command = [sys.executable, "-m", "infer", "embed", *map(str, flags)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds = time.perf_counter() - started
    said = dict(field.split("=", 1) for field in printed.splitlines()[-1].split()[1:])
    run = read_json(Path(said["output"]) / RUN_FILE)
    start = seconds - run["seconds"]["total"]
    return {**said, "seconds": seconds, "start_seconds": start, "peak_mb": run["peak_memory_mb"]}
