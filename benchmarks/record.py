"""Rows of results: one append-only CSV per benchmark.

Every row has the machine, the versions of the packages and the commit.
"""

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

from benchmarks.settings import RESULTS
from infer.ensemble.boosting.libraries import LIBRARIES
from infer.formats import engine_packages
from isic.runtime.errors import UserError, first_line
from isic.runtime.files import atomic_path, versions
from isic.runtime.machine import num_cores, processor
from isic.tables import read_csv

COMMIT_FILE = Path(__file__).parent / "COMMIT"
"""Commit of a copy of the code without its history."""
MACHINE = ("processor", "accelerator", "cores")
"""Columns that identify a kind of machine."""
MAX_REASON = 200
"""Largest number of characters of an exception's text in a row."""
RECORDED_PACKAGES = (
    *("timm", "opencv-python-headless", "h5py", "numpy", "polars", "pandas"),
    *engine_packages(),
    *(library.package for library in LIBRARIES.values()),
)
"""Packages whose versions are in every row."""

Row = dict[str, Any]


def environment() -> Row:
    """Return the time, commit, machine and versions that a measurement depends on."""
    installed = versions(*RECORDED_PACKAGES)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "processor": processor(),
        "accelerator": accelerator(),
        "cores": num_cores(),
        "python": platform.python_version(),
        "versions": " ".join(f"{name}={version}" for name, version in installed.items()),
    }


def append_rows(
    benchmark: str, rows: Sequence[Mapping[str, Any]], results: Path | None = None
) -> Path:
    """Append rows to `<results>/<benchmark>.csv` and return its path.

    Args:
        results: benchmarks/results if not given.

    Raises:
        UserError: the file is another table.
    """
    path = (results or RESULTS) / f"{benchmark}.csv"
    here = environment()
    table = pl.DataFrame([{**here, **row} for row in rows], infer_schema_length=None)
    # As text, because columns of several runs may have several types.
    table = table.with_columns(pl.all().cast(pl.String))
    if path.is_file():
        table = pl.concat([_earlier_rows(path), table], how="diagonal")
    with atomic_path(path) as temporary:
        table.write_csv(temporary)
    return path


def _earlier_rows(path: Path) -> pl.DataFrame:
    rows = read_csv(path)
    if not {"time", "commit"} <= set(rows.columns):
        raise UserError(
            f"{path} holds no results of benchmarks (time and commit); choose another --results"
        )
    return rows


def print_row(row: Row) -> None:
    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def print_and_append(benchmark: str, rows: Sequence[Row], results: Path | None = None) -> Path:
    """Print rows and append them with `append_rows`."""
    for row in rows:
        print_row(row)
    return append_rows(benchmark, rows, results)


def append_each(
    benchmark: str,
    names: Iterable[str],
    rows_of: Callable[[str], Iterable[Row]],
    results: Path | None = None,
) -> None:
    """Print and append the rows of each name; one that raises gets a row with the `reason`.

    Raises:
        UserError: the first that a name raises, since it concerns the request.
    """
    for name in names:
        try:
            for row in rows_of(name):
                print_and_append(benchmark, [row], results)
        except UserError:
            raise
        except Exception as error:  # engines and compilers raise exceptions of any type
            failed = {"what": name, "reason": error_text(error)}
            print_and_append(benchmark, [failed], results)


def error_text(error: Exception) -> str:
    """Return an exception's first line, with its type unless it is a UserError."""
    if isinstance(error, UserError):
        return first_line(error)
    text = first_line(error) if str(error).strip() else ""
    return f"{type(error).__name__}: {text}"[:MAX_REASON]


def ratio_columns(
    name: str, ours: Sequence[float], theirs: Sequence[float], digits: int = 3
) -> dict[str, float]:
    """Return the columns `<name>`, `<name>_min` and `<name>_max` of the ratios of repeats.

    Args:
        ours, theirs: rates per repeat.
        digits: decimals.
    """
    # Ratios within a repeat: a drift of the machine affects both of its rates.
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return {
        name: round(statistics.median(ratios), digits),
        f"{name}_min": round(min(ratios), digits),
        f"{name}_max": round(max(ratios), digits),
    }


def commit() -> str:
    """Return the short hash of the code's commit, or `unknown`."""
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
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    ended = subprocess.run(query, capture_output=True, text=True, check=False)
    if ended.returncode:
        return None
    first, *_ = ended.stdout.split("\n")
    return first.strip() or None
