"""What embedding costs beside its parts: the ingest alone, the engines alone, and both end to end, in turns."""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from infer.embedder import Embedder, Job, Step, cores
from infer.engines import create
from infer.plan import plan_parts
from infer.views import averaged
from isic.dataset import Dataset
from isic.images import decode_pool


def rates(job: Job, ids: pl.Series, folder: Path, repeats: int = 5) -> dict[str, float]:
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
    ways = {"ingest": _ingest(job, ids), "engine": _engine(job, ids), "end_to_end": _end_to_end(job, ids, folder)}
    measured: dict[str, list[float]] = {name: [] for name in (*ways, "share")}
    for repeat in range(repeats + 1):
        rate = {name: len(ids) / _seconds(run) for name, run in ways.items()}
        rate["share"] = rate["end_to_end"] / min(rate["ingest"], rate["engine"])
        for name, value in rate.items():
            measured[name] += [value] if repeat else []
    return {name: statistics.median(values) for name, values in measured.items()}


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _batches(ids: pl.Series, size: int) -> Iterable[list[str]]:
    return (ids.slice(start, size).to_list() for start in range(0, len(ids), size))


def _ingest(job: Job, ids: pl.Series) -> Callable[[], None]:
    store, spec = Dataset(job.data).images(job.split), job.models.spec
    out = np.empty((job.batch_size, spec.size, spec.size, 3), np.uint8)
    num_threads = job.num_threads or len(cores())

    def run() -> None:
        with decode_pool(num_threads) as pool:
            for batch in _batches(ids, job.batch_size):
                store.decode(batch, spec, out[: len(batch)], pool)

    return run


def _engine(job: Job, ids: pl.Series) -> Callable[[], None]:
    models = job.models
    engines = {fold: create(path, models.manifests[fold], job.device) for fold, path in models.artifacts.items()}
    batch = next(iter(_batches(ids, job.batch_size)))
    images = np.empty((len(batch), models.spec.size, models.spec.size, 3), np.uint8)
    Dataset(job.data).images(job.split).decode(batch, models.spec, images)

    def run() -> None:
        for names in _batches(ids, job.batch_size):
            averaged(engines, images[: len(names)], job.tta)

    return run


def _end_to_end(job: Job, ids: pl.Series, folder: Path) -> Callable[[], None]:
    embedder = Embedder(job)
    steps: list[Step] = []

    def run() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        embedder.run(plan_parts(folder, job.split, ids, job.models.folds, None, "all"), steps.append)

    return run


def whole_run(*flags: object) -> dict[str, Any]:
    """Runs `python -m infer embed` with some flags in a process of its own.

    Returns:
        `seconds` from its start to its end, `peak_mb` of memory, and what the last line says of the run.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "infer", "embed", *map(str, flags)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as stdout:
        lines = stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)  # unlike wait, it tells of this process's memory
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    said = dict(field.split("=", 1) for field in lines[-1].split()[1:])
    seconds = time.perf_counter() - started
    return {**said, "seconds": round(seconds, 1), "peak_mb": round(usage.ru_maxrss / 1024)}
