"""One engine in a process of its own: its memory is its own, and so is its crash.

Started by `benchmarks.throughput` with the path of a job; writes what it measured beside it.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infer.engines import Engine, allocator, create
from isic.errors import UserError
from isic.files import read_json, write_json
from isic.machine import peak_memory_mb
from isic.preprocess import Pixels

WARM_UP = 2
"""Calls before a measurement: the first of a shape allocates, compiles or tunes."""
NUM_INPUTS = 4
"""Batches that take turns, so that no cache holds the answer."""
NUM_CHECKED = 16
"""Images whose features go back to be compared."""


@dataclass(frozen=True)
class Job:
    """What to measure."""

    config: str
    engine: str
    """`eager`, `compile`, or the format of the artifact."""
    precision: str
    device: str
    images: str
    """A .npy file, uint8 [P, H, W, 3]."""
    batches: list[int]
    repeats: int
    seconds: float
    artifact: str | None = None
    manifest: dict[str, Any] | None = None


def main(path: Path) -> None:
    """Runs the job at a path and writes `<path>.result` after every batch size, and `<path>.features.npy`."""
    job = Job(**read_json(path))
    result: dict[str, Any] = {"rows": []}
    try:
        started = time.perf_counter()
        engine = open_engine(job)
        images = np.load(job.images)
        features = np.concatenate([engine.run(images[at : at + 1])[0] for at in range(NUM_CHECKED)])
        np.save(path.with_suffix(".features.npy"), features)
        result["load_seconds"] = round(time.perf_counter() - started, 2)
        for batch in job.batches:
            result["rows"].append({"batch": batch, **measure(engine, images, batch, job)})
            write_json(path.with_suffix(".result"), result)
    except (UserError, ImportError, RuntimeError, MemoryError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        write_json(path.with_suffix(".result"), {**result, "reason": reason[0]})


def open_engine(job: Job) -> Engine:
    """Returns what runs a batch from host to host."""
    if job.artifact is None or job.manifest is None:
        from benchmarks.eager import EagerEngine  # noqa: PLC0415  an artifact's process has no torch in it

        return EagerEngine(job.config, job.engine, job.precision, job.device)
    return create(Path(job.artifact), job.manifest, job.device)


def measure(engine: Engine, images: Pixels, batch: int, job: Job) -> dict[str, Any]:
    """Measures calls of one batch size, each from uint8 on the host to float32 on the host, which waits for the device.

    Returns:
        Images per second (median, least and most of the repeats), latency percentiles, and peak memory.
    """
    allocate = allocator(engine)
    inputs = [allocate((batch, *images.shape[1:])) for _ in range(NUM_INPUTS)]
    for number, array in enumerate(inputs):
        array[...] = images[(np.arange(batch) + number * batch) % len(images)]
    _reset_peak()
    for number in range(WARM_UP):
        engine.run(inputs[number % NUM_INPUTS])
    repeats = [_repeat(engine, inputs, job.seconds) for _ in range(job.repeats)]
    rates = sorted(batch * len(calls) / sum(calls) for calls in repeats)
    latencies = 1000 * np.concatenate(repeats)
    percentiles = {f"p{p}_ms": round(float(np.percentile(latencies, p)), 3) for p in (50, 90, 99)}
    return {**spread(rates), **percentiles, "calls": len(latencies), "peak_mb": _peak_mb(job.device)}


def _repeat(engine: Engine, inputs: Sequence[Pixels], seconds: float) -> list[float]:
    calls: list[float] = []
    while not calls or sum(calls) < seconds:
        started = time.perf_counter()
        engine.run(inputs[len(calls) % NUM_INPUTS])
        calls.append(time.perf_counter() - started)
    return calls


def spread(rates: Sequence[float]) -> dict[str, float]:
    """Returns the median, least and most of images per second."""
    return {
        "images_per_second": round(float(np.median(rates)), 2),
        "min": round(min(rates), 2),
        "max": round(max(rates), 2),
    }


def _reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # Linux: the peak begins anew at what is used now


def _peak_mb(device: str) -> int | None:
    """Returns the peak resident memory of this process, or what the GPU has given out by now."""
    if device == "cuda":
        import torch  # noqa: PLC0415

        free, total = torch.cuda.mem_get_info()
        return int((total - free) // 2**20)
    return peak_memory_mb()


def job_file(job: Job, path: Path) -> None:
    """Writes a job for `main`."""
    write_json(path, asdict(job))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
