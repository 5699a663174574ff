"""Rows of results: one append-only CSV a benchmark, with machine, versions and commit in every row."""

import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

from isic.runtime.errors import UserError
from isic.runtime.files import atomic_path, versions
from isic.runtime.machine import num_cores, processor
from isic.tables import read_csv

RESULTS = Path(__file__).parent / "results"
COMMIT_FILE = Path(__file__).parent / "COMMIT"
"""Names the commit where the code was copied without its history."""
MACHINE = ("processor", "accelerator", "cores")
"""Columns that tell one kind of machine from another."""
MAX_REASON = 200
"""Characters of a reason that a library gives."""
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
    "tensorrt",
    "tensorrt_rtx",
)


Row = dict[str, Any]


def machine() -> dict[str, Any]:
    """Returns what a figure depends on beside the code: processor, cores, GPU, Python, packages, commit, time."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "processor": processor(),
        "accelerator": accelerator(),
        "cores": num_cores(),
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
        table = pl.concat([_earlier(path), table], how="diagonal")
    with atomic_path(path) as temporary:
        table.write_csv(temporary)
    return path


def _earlier(path: Path) -> pl.DataFrame:
    """Read the results to append to. Raises UserError if the file is another table."""
    rows = read_csv(path)
    if not {"time", "commit"} <= set(rows.columns):
        raise UserError(
            f"{path} holds no results of benchmarks (time and commit); choose another --results"
        )
    return rows


def write(benchmark: str, rows: Sequence[Row], results: Path | None = None) -> Path:
    """Prints rows and appends them, as `append` does."""
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return append(benchmark, rows, results)


def append_each(
    benchmark: str,
    names: Iterable[str],
    rows_of: Callable[[str], Iterable[Row]],
    results: Path | None = None,
) -> None:
    """Prints and appends the rows of each name as they come, and for a name that fails one with the `reason`.

    Raises:
        UserError: the first that a name raises; it is of what was asked for.
    """
    for name in names:
        try:
            for row in rows_of(name):
                write(benchmark, [row], results)
        except UserError:
            raise
        except Exception as error:  # what engines and compilers raise has no other base
            write(benchmark, [{"what": name, "reason": reason(error)}], results)


def reason(error: Exception) -> str:
    """Returns what an exception says, short enough for a table: a sentence for users, or the type and a first line."""
    lines = str(error).strip().splitlines() or [""]
    return (
        lines[0]
        if isinstance(error, UserError)
        else f"{type(error).__name__}: {lines[0]}"[:MAX_REASON]
    )


def ratio(
    name: str, ours: Sequence[float], theirs: Sequence[float], digits: int = 3
) -> dict[str, float]:
    """Returns the columns `<name>`, `<name>_min` and `<name>_max`: median, least and most of the ratios of repeats.

    Each of ours is set against the one of theirs that took its turn beside it.
    """
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    spread = {"": statistics.median(ratios), "_min": min(ratios), "_max": max(ratios)}
    return {name + key: round(value, digits) for key, value in spread.items()}


def commit() -> str:
    """Returns the short hash of the code that runs, `unknown` where nothing says it."""
    if COMMIT_FILE.is_file():
        return COMMIT_FILE.read_text().strip()
    ended = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.stdout.strip() or "unknown"


@cache
def accelerator() -> str | None:
    """Returns the name of the machine's GPU, None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    ended = subprocess.run(query, capture_output=True, text=True, check=False)
    names = ended.stdout.split("\n")
    return names[0].strip() or None if ended.returncode == 0 else None
