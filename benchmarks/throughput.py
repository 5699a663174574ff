"""`python -m benchmarks throughput`: images per second of every engine."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.artifacts import ArtifactStore, BuildFailed, open_store
from benchmarks.baselines import Features
from benchmarks.eager import TORCH_ENGINES
from benchmarks.limits import Work, count_work, limits
from benchmarks.process import run_group
from benchmarks.record import Row, append_each, error_text
from benchmarks.settings import BATCHES, ThroughputSettings
from benchmarks.untrained import (
    Artifact,
    UntrainedModel,
    chosen,
    create_untrained,
    example_images,
    find_configs,
    least_cosine,
)
from benchmarks.worker import NUM_CHECKED, EngineJob, write_job
from export.formats import FORMATS, offered_precisions
from export.parity import run_model
from infer.engines import unavailable_reason
from isic.preprocess import Pixels
from isic.runtime.errors import UserError
from isic.runtime.files import read_json

POOL = 64
"""Different images that the inputs are made of."""
# A CPU may emulate the low ones.
TORCH_PRECISIONS = {"cpu": ("fp32",), "cuda": ("fp32", "fp16", "bf16")}
"""Precisions that PyTorch is measured in."""


def throughput(settings: ThroughputSettings) -> None:
    """Measure images per second of untrained networks, each engine in its own process."""
    wanted = select_engines(settings)
    with open_store(settings.artifacts) as store:
        rows_of = partial(throughput_rows, wanted=wanted, settings=settings, store=store)
        append_each("throughput", find_configs(settings.config), rows_of, settings.results)


def resolve_device(device: str) -> str:
    """Return `cpu` or `cuda`; `auto` is a GPU if torch can use one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def batch_sizes(settings: ThroughputSettings) -> list[int]:
    return list(settings.batch or BATCHES[resolve_device(settings.device)])


def select_engines(settings: ThroughputSettings) -> list[tuple[str, str]]:
    """Return the pairs of engine and precision to measure. Raise UserError if there are none."""
    device = resolve_device(settings.device)
    known = [(name, precision) for name in TORCH_ENGINES for precision in TORCH_PRECISIONS[device]]
    for name, row in FORMATS.items():
        if device in row.precisions:
            known += [(name, precision) for precision in offered_precisions(name, device)]
    engines = list(dict.fromkeys(name for name, _ in known))
    precisions = list(dict.fromkeys(precision for _, precision in known))
    engines = chosen("formats", settings.formats, engines)
    precisions = chosen("precision", settings.precision, precisions)
    selected = [pair for pair in known if pair[0] in engines and pair[1] in precisions]
    if not selected:
        pairs = ", ".join(f"{name} {precision}" for name, precision in known)
        raise UserError(f"no engine of --formats has such a --precision; known are: {pairs}")
    return selected


def throughput_rows(
    config: str,
    wanted: list[tuple[str, str]],
    settings: ThroughputSettings,
    store: ArtifactStore,
) -> Iterator[Row]:
    """Yield the rows of a config for some engines and precisions."""
    untrained = create_untrained(config)
    work = count_work(untrained.model, untrained.spec.size)
    images = example_images(settings.data, untrained.spec, POOL)
    features, *_ = run_model(untrained.model, images[:NUM_CHECKED])
    for engine, precision in wanted:
        case = EngineCase(untrained, engine, precision, images, features)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for measured in engine_rows(case, settings, store, Path(folder)):
                yield {
                    "what": untrained.settings.name,
                    "engine": engine,
                    "precision": precision,
                    "device": resolve_device(settings.device),
                    **measured,
                    "input": settings.data.name if settings.data else "noise",
                    "size": untrained.spec.size,
                    **_limit_columns(measured, resolve_device(settings.device), precision, work),
                }


@dataclass(frozen=True)
class EngineCase:
    """One engine of a network in one precision."""

    untrained: UntrainedModel
    engine: str
    """`eager`, `compile`, or an export format."""
    precision: str
    images: Pixels
    """The pool, uint8 [P, size, size, 3]."""
    features: Features
    """Of the first NUM_CHECKED images, by the network in float32."""


def engine_rows(
    case: EngineCase, settings: ThroughputSettings, store: ArtifactStore, folder: Path
) -> Iterator[Row]:
    """Yield the measurements of each batch size, or the `reason` that there are none."""
    artifact: Artifact | None = None
    if case.engine not in TORCH_ENGINES:
        reason = unavailable_reason(case.engine, resolve_device(settings.device))
        if reason:
            yield {"reason": reason}
            return
        try:
            artifact = _build(case, settings, store)
        except BuildFailed as error:
            yield {"reason": f"does not build: {error}"}
            return
    result = run_job(case, artifact, settings, folder / "job.json")
    common: Row = {
        "load_seconds": result.get("load_seconds"),
        "build_seconds": artifact and round(artifact.seconds, 1),
    }
    features_path = folder / "job.features.npy"
    if features_path.is_file():
        features = np.load(features_path).astype(np.float32)
        common["cosine"] = round(least_cosine(case.features, features), 7)
    for row in result["rows"]:
        yield {**row, **common}
    if "reason" in result:
        yield {"reason": result["reason"]}


def _build(case: EngineCase, settings: ThroughputSettings, store: ArtifactStore) -> Artifact:
    return store.get(
        case.untrained,
        case.engine,
        case.precision,
        device=resolve_device(settings.device),
        max_batch=max(batch_sizes(settings)),
        images=case.images[NUM_CHECKED:],
    )


def run_job(
    case: EngineCase, artifact: Artifact | None, settings: ThroughputSettings, path: Path
) -> dict[str, Any]:
    """Run an engine in its own process and return its `rows`, and the `reason` of a failure."""
    images_path = path.with_name("images.npy")
    np.save(images_path, case.images)
    job = EngineJob(
        config=case.untrained.config,
        engine=case.engine,
        precision=case.precision,
        device=resolve_device(settings.device),
        images=str(images_path),
        batches=batch_sizes(settings),
        repeats=settings.repeats,
        seconds=settings.seconds,
        artifact=str(artifact.path) if artifact else None,
        manifest=artifact.manifest if artifact else None,
    )
    write_job(job, path)
    failure = _run_worker(path, settings.patience)
    result_path = path.with_suffix(".result")
    result = read_json(result_path) if result_path.is_file() else {"rows": []}
    return {**result, "reason": failure} if failure else result


def _run_worker(path: Path, seconds: float) -> str | None:
    """Run the worker on a job and return the reason that it failed, or None."""
    command = [sys.executable, "-m", "benchmarks.worker", str(path)]
    try:
        ended = run_group(command, seconds, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except subprocess.TimeoutExpired:
        return f"took longer than {seconds:.0f} s"
    if not ended.returncode:
        return None
    lines = ended.stderr.splitlines()
    return f"its process ended with {ended.returncode}: {lines[-1] if lines else ''}"


def _limit_columns(measured: Row, device: str, precision: str, work: Work) -> Row:
    if "reason" in measured:
        return {}
    rate = measured["images_per_second"]
    try:
        return limits(device, precision).of(work, precision, measured["batch"], rate)
    except Exception as error:  # torch may have no product of that precision here
        return {"reason": f"no limit to compare with: {error_text(error)}"}
