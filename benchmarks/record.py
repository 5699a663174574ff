"""Rows of results: one append-only CSV a benchmark, with machine, versions and commit in every row."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from isic.files import atomic_path, versions

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "timm",
    "onnxruntime-gpu",
    "onnxruntime",
    "opencv-python-headless",
    "h5py",
    "numpy",
    "polars",
    "pandas",
    "lightgbm",
    "xgboost-cpu",
    "catboost",
)


def machine() -> dict[str, Any]:
    """Returns what a figure depends on beside the code: processor, cores, Python, packages, commit, time."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": " ".join(f"{name}={version}" for name, version in versions(*PACKAGES).items()),
    }


def append(benchmark: str, rows: Sequence[Mapping[str, Any]], results: Path | None = None) -> Path:
    """Appends rows to `<results>/<benchmark>.csv`; columns that earlier rows lack are blank there.

    `results` is benchmarks/results if not given.
    """
    path = (results or RESULTS) / f"{benchmark}.csv"
    here = machine()
    table = pl.DataFrame([{**here, **row} for row in rows], infer_schema_length=None)
    table = table.with_columns(pl.all().cast(pl.String))
    if path.is_file():
        table = pl.concat([pl.read_csv(path, infer_schema=False), table], how="diagonal")
    with atomic_path(path) as temporary:
        table.write_csv(temporary)
    return path


def _commit() -> str:
    ended = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return ended.stdout.strip() or "unknown"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
