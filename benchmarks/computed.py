"""Rates that one H200 with 16 cores would reach, computed from limits and from costs measured here.

None of them has been measured. An engine's own rate is that of its products at the GPU's matrix
rate, followed by its memory traffic at the rate of a copy. The rest of the pipeline runs beside
the engine, so the slowest part decides.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import polars as pl

from benchmarks.page import last_rows, read_results
from train.loaders import TRAINING_PASSES

MATMUL = 790e12
"""Floating-point operations per second of a large product in bfloat16 on an H200."""
COPY = 4.3e12
"""Bytes per second, read and written, of a large copy on an H200."""
UPLOAD = 55e9
"""Bytes per second to a GPU over PCIe 5."""
CORES = 16
SOURCES = ("files", "kept pixels")
"""Of the images that loader processes augment."""
H200_CONFIGS = (
    "vit_tiny",
    "vit_small",
    "vit_base",
    "eva02_small",
    "eva02_base",
    "convnext_tiny",
    "convnext_base",
)
NUM_VIEWS = 8
"""Of `--tta d4`."""

Rates = Mapping[str, float]
"""Images per second, or shares of them, by name."""


def h200_rates(size: int, gflop: float, megabytes: float, costs: Rates) -> dict[str, float]:
    """Return a config's images per second by column of the table.

    Args:
        size: side of the images, pixels.
        gflop: billions of floating-point operations per image.
        megabytes: memory traffic per image in bfloat16.
        costs: see `measured_costs`.
    """
    engine = engine_rate(gflop, megabytes)
    upload = UPLOAD / (3 * size**2)
    busy = engine * costs["share"]
    rates = {
        "engine": engine,
        "processes": min(busy, upload, costs["decoding"], costs["processes"]),
        "threads": min(busy, upload, costs["threads"]),
        "d4_graph": min(busy / NUM_VIEWS, upload, costs["decoding"], costs["processes"]),
        "d4_host": min(busy / NUM_VIEWS, upload / NUM_VIEWS, costs["d4"]),
    }
    return {**rates, "share": rates["processes"] / engine}


def engine_rate(gflop: float, megabytes: float) -> float:
    """Return the images per second of one forward pass."""
    return 1 / (gflop * 1e9 / MATMUL + megabytes * 1e6 / COPY)


def measured_costs(results: Path) -> Rates:
    """Return the images per second that each part of the pipeline allows 16 cores.

    `share` is the part of its own rate that an engine reached end to end.

    Raises:
        KeyError: a row is absent.
    """
    ingest = _last(results / "ingest.csv", "images_per_second")
    pipeline = _last(results / "pipeline.csv", "images_per_second")
    control = _last(results / "pipeline.csv", "control_us")
    shares = _last(results / "pipeline.csv", "share")
    views = _last(results / "embed.csv", "end_to_end", num_threads="1", tta="d4")
    return {
        "decoding": CORES * ingest["ours, 1 thread"],
        "threads": pipeline[f"decoding by {CORES} threads, a sleep"],
        "processes": 1e6 / control["control thread, 768 features"],
        "d4": CORES * views["null"],
        "share": shares[f"engine of 10,000 images/s, {CORES} processes"],
    }


def _last(path: Path, column: str, **wanted: str) -> dict[str, float]:
    """Return a column's last value by `what`, of rows with the wanted values in other columns."""
    rows = read_results(path)
    if not {column, *wanted} <= set(rows.columns):
        return {}
    rows = rows.filter(pl.col(column).is_not_null())
    rows = rows.filter(*(pl.col(name) == value for name, value in wanted.items()))
    return {
        name: float(value)
        for name, value in last_rows(rows, ("what",)).select("what", column).iter_rows()
    }


def training_column(results: Path) -> dict[str, str]:
    """Return the images per second of training on an H200, by config."""
    return {
        config: _text(training_rate(gflop, megabytes))
        for config, (_, gflop, megabytes) in network_facts(results).items()
    }


def training_rate(gflop: float, megabytes: float) -> float:
    """Return the images per second of training."""
    return engine_rate(gflop, megabytes) / TRAINING_PASSES


def fed_column(level: str) -> Callable[[Path], dict[str, str]]:
    """Return the lookup of the rates of 16 cores that augment, over that of an H200 that trains.

    A text has that of images from files, then that of kept pixels.
    """
    return partial(_fed, level)


def _fed(level: str, results: Path) -> dict[str, str]:
    path = results / "augment.csv"
    if not path.is_file():
        return {}
    texts = {}
    for config, (size, gflop, megabytes) in network_facts(results).items():
        rate = training_rate(gflop, megabytes)
        costs = [
            _last(path, "images_per_second", source=source, size=f"{size:.0f}").get(level)
            for source in SOURCES
        ]
        if all(costs):
            texts[config] = " / ".join(_multiple(CORES * cost / rate) for cost in costs if cost)
    return texts


def _multiple(ratio: float) -> str:
    """Return a ratio with two significant digits or more."""
    return f"{ratio:.{2 if ratio < 1 else 1 if ratio < 10 else 0}f}"


def h200_column(name: str) -> Callable[[Path], dict[str, str]]:
    """Return the lookup of a column of the table: its text by config."""
    return partial(_column, name)


def _column(name: str, results: Path) -> dict[str, str]:
    try:
        costs = measured_costs(results)
    except KeyError:
        return {}  # not measured yet
    return {
        config: _text(h200_rates(int(size), gflop, megabytes, costs)[name])
        for config, (size, gflop, megabytes) in network_facts(results).items()
    }


def network_facts(results: Path) -> dict[str, tuple[float, float, float]]:
    """Return the size, GFLOP and megabytes per image by config, as `h200_rates` takes them.

    A config whose work has not been counted is absent.
    """
    rows = last_rows(read_results(results / "configs.csv"), ("what",))
    columns = ("what", "size", "gflop_per_image", "mb_per_image")
    if not set(columns) <= set(rows.columns):
        return {}
    facts = rows.select(columns).drop_nulls()
    return {
        config: (float(size), float(gflop), float(megabytes))
        for config, size, gflop, megabytes in facts.iter_rows()
    }


def _text(rate: float) -> str:
    """Return a rate with two or three significant digits, and a share as a percentage."""
    return f"{rate:.0%}" if rate <= 1 else f"{round(rate, 1 - len(str(int(rate))) + 2):,.0f}"
