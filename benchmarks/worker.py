"""One engine in a process of its own: its memory is its own, and so is its crash.

Started by `benchmarks.throughput` with the path of a job; writes what it measured beside it.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import reason
from infer.engines import Engine, allocator, create
from isic.preprocess import Pixels
from isic.runtime.files import read_json, write_json
from isic.runtime.machine import peak_memory_mb

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
        used_before = _used_mb() if job.device == "cuda" else None
        started = time.perf_counter()
        engine = open_engine(job)
        images = np.load(job.images)
        np.save(path.with_suffix(".features.npy"), checked_features(engine, images, job.batches[0]))
        result["load_seconds"] = round(time.perf_counter() - started, 2)
        for batch in job.batches:
            rates = measure(engine, images, batch, job)
            peak = peak_memory_mb() if used_before is None else _used_mb() - used_before
            result["rows"].append({"batch": batch, **rates, "peak_mb": peak})
            write_json(path.with_suffix(".result"), result)
    except Exception as error:  # what engines raise has no other base
        write_json(path.with_suffix(".result"), {**result, "reason": reason(error)})


def open_engine(job: Job) -> Engine:
    """Returns what runs a batch from host to host."""
    if job.artifact is None or job.manifest is None:
        from benchmarks.eager import EagerEngine  # noqa: PLC0415  an artifact's process has no torch in it

        return EagerEngine(job.config, job.engine, job.precision, job.device)
    return create(Path(job.artifact), job.manifest, job.device)


def checked_features(engine: Engine, images: Pixels, batch: int) -> NDArray[np.float32]:
    """Returns the features [NUM_CHECKED, D] of the first images, by calls of a batch that is measured anyway.

    Another batch might have to be compiled for, which can take longer than the measurement.
    """
    starts = range(0, NUM_CHECKED, batch)
    pieces = [engine.run(images[np.arange(at, at + batch) % len(images)])[0] for at in starts]
    return np.concatenate(pieces)[:NUM_CHECKED]


def measure(engine: Engine, images: Pixels, batch: int, job: Job) -> dict[str, Any]:
    """Measures calls of one batch size, each from uint8 on the host to float32 on the host, which waits for the device.

    Returns:
        Images per second (median, least and most of the repeats) and latency percentiles.
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
    return {**spread(rates), **percentiles, "calls": len(latencies)}


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
    with contextlib.suppress(OSError):  # there is none, or a container may not write it
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # Linux: the peak begins anew at what is used now


def _used_mb() -> int:
    """Returns what the GPU has given out by now, to this process and to others, CUDA's own part in this one included.

    Engines keep what they once had, so that what it has grown by since they were opened is their peak.
    """
    import torch  # noqa: PLC0415  a CPU artifact's process has no torch in it

    free, total = torch.cuda.mem_get_info()
    return int((total - free) // 2**20)


def job_file(job: Job, path: Path) -> None:
    """Writes a job for `main`."""
    write_json(path, asdict(job))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
