"""Measures one engine in a process of its own, which isolates its memory and its crashes.

`benchmarks.throughput` starts it with the path of a job; the results are written next to it.
"""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import error_text
from infer.engines import IN_FLIGHT, Engine, Pending, create
from infer.engines.pinned import page_locked
from isic.preprocess import Pixels
from isic.runtime.files import read_json, write_json
from isic.runtime.machine import peak_memory_mb

# The first call with a shape allocates, compiles or tunes.
WARM_UP = 2
"""Calls before a measurement."""
# In turns, so that no cache holds the input; more than are in flight, which read theirs.
NUM_INPUTS = IN_FLIGHT + 1
"""Different batches of input."""
NUM_CHECKED = 16
"""Images whose features are compared with the network's own."""


@dataclass(frozen=True)
class EngineJob:
    """One measurement."""

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
    """Run the job at `path`; write `.features.npy` and `.result` next to it."""
    job = EngineJob(**read_json(path))
    result: dict[str, Any] = {"rows": []}
    try:
        used_before = _used_mb() if job.device == "cuda" else None
        started = time.perf_counter()
        engine = open_engine(job)
        images = np.load(job.images)
        np.save(path.with_suffix(".features.npy"), checked_features(engine, images, job.batches[0]))
        result["load_seconds"] = round(time.perf_counter() - started, 2)
        for batch in job.batches:
            rates = batch_rates(engine, images, batch, job.repeats, job.seconds)
            peak = peak_memory_mb() if used_before is None else _used_mb() - used_before
            result["rows"].append({"batch": batch, **rates, "peak_mb": peak})
            # After every batch size, so that a crash loses only the current one.
            write_json(path.with_suffix(".result"), result)
    except Exception as error:  # engines raise exceptions of any type
        write_json(path.with_suffix(".result"), {**result, "reason": error_text(error)})


def open_engine(job: EngineJob) -> Engine:
    if job.artifact is None or job.manifest is None:
        # Only here: importing torch would count as memory of the other engines.
        from benchmarks.eager import eager_engine  # noqa: PLC0415

        return eager_engine(job.config, job.engine, job.precision, job.device, max(job.batches))
    return create(Path(job.artifact), job.manifest, job.device)


def checked_features(engine: Engine, images: Pixels, batch: int) -> NDArray[np.float32]:
    """Return the features [NUM_CHECKED, D] of the first images, computed in batches."""
    # With a batch size that is measured too: compiling for another one can take longer than the
    # measurement.
    parts = []
    for start in range(0, NUM_CHECKED, batch):
        rows = np.arange(start, start + batch) % len(images)
        features, *_ = engine.run(images[rows])
        parts.append(features)
    return np.concatenate(parts)[:NUM_CHECKED]


def batch_rates(
    engine: Engine, images: Pixels, batch: int, num_repeats: int, seconds: float
) -> dict[str, Any]:
    """Measure batches from uint8 to features in host memory, at least `seconds` per repeat.

    Returns:
        Images per second with IN_FLIGHT batches at once (median, least and most of the repeats),
        and of one call at a time the same median and the latency percentiles.
    """
    inputs = cycle(_make_inputs(engine, images, batch))
    _reset_peak()
    for _ in range(WARM_UP):
        engine.run(next(inputs))
    rates = [batch * stream_rate(engine, inputs, seconds) for _ in range(num_repeats)]
    calls = [_time_calls(engine, inputs, seconds) for _ in range(num_repeats)]
    one_at_a_time = np.median([batch * len(times) / sum(times) for times in calls])
    latencies = 1000 * np.concatenate(calls)
    percentiles = {f"p{p}_ms": round(float(np.percentile(latencies, p)), 3) for p in (50, 90, 99)}
    return {
        **spread(rates),
        "in_flight": IN_FLIGHT,
        "one_at_a_time": round(float(one_at_a_time), 2),
        **percentiles,
        "calls": len(latencies),
    }


def _make_inputs(engine: Engine, images: Pixels, batch: int) -> list[Pixels]:
    """Return NUM_INPUTS batches of the images, in memory that the engine's device prefers."""
    inputs = np.empty((NUM_INPUTS, batch, *images.shape[1:]), np.uint8)
    for number, array in enumerate(inputs):
        array[...] = images[(np.arange(batch) + number * batch) % len(images)]
    return list(page_locked(inputs, engine.device))


def stream_rate(engine: Engine, inputs: Iterator[Pixels], seconds: float) -> float:
    """Return batches per second while IN_FLIGHT are pending, as in an embedding run."""
    pending: deque[Pending] = deque(engine.submit(next(inputs)) for _ in range(IN_FLIGHT))
    # From one result to another with the queue full at both: neither filling nor emptying counts.
    _replace_oldest(engine, inputs, pending)
    num_batches = 0
    started = time.perf_counter()
    while not num_batches or time.perf_counter() - started < seconds:
        _replace_oldest(engine, inputs, pending)
        num_batches += 1
    elapsed = time.perf_counter() - started
    for batch in pending:
        batch.result()
    return num_batches / elapsed


def _replace_oldest(engine: Engine, inputs: Iterator[Pixels], pending: deque[Pending]) -> None:
    """Wait for the oldest batch and submit another one."""
    pending.popleft().result()
    pending.append(engine.submit(next(inputs)))


def _time_calls(engine: Engine, inputs: Iterator[Pixels], seconds: float) -> list[float]:
    """Return the seconds of calls, each of which starts after the one before it has ended."""
    calls: list[float] = []
    while not calls or sum(calls) < seconds:
        images = next(inputs)
        started = time.perf_counter()
        engine.run(images)
        calls.append(time.perf_counter() - started)
    return calls


def spread(rates: Sequence[float]) -> dict[str, float]:
    """Return the columns of images per second: median, least and most."""
    return {
        "images_per_second": round(float(np.median(rates)), 2),
        "min": round(min(rates), 2),
        "max": round(max(rates), 2),
    }


def _reset_peak() -> None:
    """Reset the peak memory of this process to its current memory, on Linux."""
    with contextlib.suppress(OSError):  # not on other systems, nor in some containers
        Path("/proc/self/clear_refs").write_text("5")


def _used_mb() -> int:
    """Return the GPU's memory in use by all processes, with CUDA's own."""
    # Engines do not return memory to the GPU, so the growth since before they opened is their peak.
    import torch  # noqa: PLC0415 - the process of a CPU artifact has no torch

    free, total = torch.cuda.mem_get_info()
    return int((total - free) // 2**20)


def write_job(job: EngineJob, path: Path) -> None:
    write_json(path, asdict(job))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
