"""`python -m benchmarks tabular`: time and memory of features, fitting and predicting."""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pandas as pd
import polars as pl
from numpy.typing import NDArray

from benchmarks.record import Row, print_and_append
from benchmarks.settings import TabularSettings
from benchmarks.timing import seconds_of
from infer.ensemble.boosting.libraries import LIBRARIES, parameters_of
from infer.ensemble.boosting.out_of_fold import undersample
from isic import schema
from isic.features import SETS, compute, fit_encoding
from isic.features.formulas import ERR
from isic.features.relative import EXTREMES, RANKED
from isic.metadata import read_metadata
from isic.runtime.machine import num_cores, peak_memory_mb
from isic.synth.rows import default_positives, draw_rows, num_patients
from isic.tables import read_parquet, write_parquet

NUM_COLUMNS = 968
"""Columns of a published ensemble's matrix, with embeddings."""
LEAVES = 31
"""Size of such an ensemble's model."""
FIT_ROWS = 10_000
FEW_ROWS = 200
"""Rows of a table so small that only the fixed cost of a call counts."""
WARM_ROWS = 4_000
"""Rows of the warm-up, which starts threads and allocates memory."""
TOLERANCE = 1e-4


def tabular(settings: TabularSettings) -> None:
    """Run `benchmarks tabular`, which its settings describe."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The fixed cost of a call, which a small table shows.
        few = feature_rows(write_synthetic_table(folder, FEW_ROWS), settings.repeats)
        start_seconds = {row["what"]: row["seconds"] for row in few}
        for num_rows in settings.rows:
            path = write_synthetic_table(folder, num_rows)
            for row in feature_rows(path, settings.repeats):
                rows.append({**row, "start_seconds": start_seconds[row["what"]]})
            rows += fit_rows(path, settings.fit_rounds)
    rows += predict_rows(settings.predict_rows, settings.trees, settings.repeats)
    print(f"appended to {print_and_append('tabular', rows, settings.results)}")


def write_synthetic_table(folder: Path, num_rows: int) -> Path:
    """Write a synthetic training table, without images, and return its path."""
    path = folder / f"{num_rows}.parquet"
    ids = [f"ISIC_{i:07d}" for i in range(num_rows)]
    patients = [f"IP_{i:07d}" for i in range(num_patients(num_rows))]
    rows = draw_rows(ids, patients, default_positives(num_rows), np.random.default_rng(0))
    write_parquet(path, rows.table)
    return path


def feature_rows(path: Path, repeats: int) -> list[Row]:
    """Measure the ways to compute features, in turns, each repeat in its own process."""
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    peaks: dict[str, list[int]] = {name: [] for name in METHODS}
    for _ in range(repeats):
        for name in METHODS:
            elapsed, peak = measure_alone(name, path)
            seconds[name].append(elapsed)
            if peak:
                peaks[name].append(peak)
    check_same(path)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    num_rows = len(read_parquet(path, columns=[schema.ID]))
    return [
        {
            "what": name,
            "rows": num_rows,
            "seconds": round(medians[name], 3),
            "peak_mb": max(peaks[name], default=None),
            "ours_is_faster_by": (
                None if name == FULL else round(medians[name] / medians[PART], 1)
            ),
        }
        for name in METHODS
    ]


def measure_alone(name: str, path: Path) -> tuple[float, int | None]:
    """Return the seconds (without reading) and peak memory in MB of one method in a new process."""
    # spawn: a forked child would inherit this process's memory and count it in its peak.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, name, path).result()


def _measure(name: str, path: Path) -> tuple[float, int | None]:
    method = METHODS[name]
    table = method.read(path)
    # Starts threads and allocates memory, which a long run does only once.
    method.compute(table.head(WARM_ROWS))
    return seconds_of(lambda: method.compute(table)), peak_memory_mb()


def _part_names() -> tuple[str, ...]:
    zscores = (f"{name}_patient_z" for name in schema.NUMERIC)
    ranks = (f"{name}_patient_rank" for name in RANKED)
    extremes = (f"{name}_to_patient_{which}" for name in EXTREMES for which in ("max", "min"))
    return (*zscores, *ranks, *extremes, "patient_num_lesions", "patient_area_sum")


def compute_part(metadata: pl.DataFrame) -> pl.DataFrame:
    """Return `isic_id` and the features that `compute_pandas` computes."""
    return compute(metadata, _part_names())


Zscore = Callable[[Any, pd.Series], pd.Series]
"""Takes a column grouped by patient, and the column itself."""


def compute_pandas(table: pd.DataFrame, zscore: Zscore) -> pd.DataFrame:
    """Return the same as `compute_part`, computed with pandas."""
    group = table.groupby("patient_id")
    columns = {schema.ID: table[schema.ID]}
    for name in schema.NUMERIC:
        columns[f"{name}_patient_z"] = zscore(group[name], table[name])
    for name in RANKED:
        columns[f"{name}_patient_rank"] = group[name].rank(pct=True)
    for name in EXTREMES:
        for which in ("max", "min"):
            columns[f"{name}_to_patient_{which}"] = table[name] / group[name].transform(which)
    columns["patient_num_lesions"] = group[schema.ID].transform("count")
    columns["patient_area_sum"] = group["tbp_lv_areaMM2"].transform("sum")
    return pd.DataFrame(columns)


def zscore_by_name(group: Any, column: pd.Series) -> pd.Series:
    """The fast way in pandas: two transforms that it has in C."""
    return (column - group.transform("mean")) / (group.transform("std").fillna(0) + ERR)


def zscore_by_function(group: Any, column: pd.Series) -> pd.Series:
    """The short way in pandas: a Python function that is called per patient."""
    return group.transform(lambda x: (x - x.mean()) / ((x.std() if x.count() > 1 else 0) + ERR))


def check_same(path: Path) -> None:
    """Raise AssertionError if the methods do not compute the same values."""
    ours = compute_part(read_metadata(path))
    for zscore in (zscore_by_name, zscore_by_function):
        theirs = compute_pandas(pd.read_parquet(path), zscore)
        assert ours[schema.ID].to_list() == theirs[schema.ID].to_list()
        for name in _part_names():
            values = theirs[name].to_numpy(np.float64)
            np.testing.assert_allclose(
                ours[name].to_numpy(), values, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name
            )


@dataclass(frozen=True)
class Method:
    """One way to compute features."""

    read: Callable[[Path], Any]
    """Reads the table; not timed."""
    compute: Callable[[Any], Any]


FULL = "default features"
PART = "part of them"
METHODS = {
    FULL: Method(read_metadata, lambda table: compute(table, SETS["engineered"])),
    PART: Method(read_metadata, compute_part),
    'the part in pandas, transform("mean")': Method(
        pd.read_parquet, lambda table: compute_pandas(table, zscore_by_name)
    ),
    "the part in pandas, transform(lambda)": Method(
        pd.read_parquet, lambda table: compute_pandas(table, zscore_by_function)
    ),
}


def fit_rows(path: Path, num_rounds: int | None) -> list[Row]:
    """Measure one booster per library on a fold's undersampled rows, on one thread."""
    metadata = read_metadata(path)
    target = metadata[schema.TARGET].to_numpy()
    rows = undersample(target, np.arange(len(target)), 100.0, (0, 0))
    features = compute(metadata, SETS["engineered"])[rows]
    matrix = fit_encoding(features, SETS["engineered"]).transform(features)
    changes = {"num_rounds": num_rounds} if num_rounds else {}
    measured: list[Row] = []
    for name, library in LIBRARIES.items():
        parameters = parameters_of(name, changes)
        started = time.perf_counter()
        library.fit(matrix, target[rows], SETS["engineered"], parameters, 0)
        seconds = round(time.perf_counter() - started, 2)
        measured.append({"what": f"{name}, one booster", "rows": len(rows), "seconds": seconds})
    return measured


def predict_rows(num_rows: int, num_trees: int, repeats: int) -> list[Row]:
    """Measure predictions from a C-ordered float32 matrix and from an Arrow table, in turns."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((num_rows, NUM_COLUMNS), dtype=np.float32)
    names = [f"f{i}" for i in range(NUM_COLUMNS)]
    text = _fit_lightgbm(matrix[:FIT_ROWS], names, num_trees, rng)
    predict = LIBRARIES["lightgbm"].load(text)
    booster = lightgbm.Booster(model_str=text)
    arrow = pl.from_numpy(matrix, names).to_arrow()
    ours = f"predict, {num_trees} trees, {NUM_COLUMNS} features"
    calls: dict[str, Callable[[], Any]] = {
        ours: lambda: predict(matrix, num_cores()),
        f"{ours}, from an Arrow table": lambda: booster.predict(arrow),
    }
    np.testing.assert_allclose(*(call() for call in calls.values()))  # also warms up
    rates = _rates_in_turns(calls, num_rows, repeats)
    return [
        {
            "what": name,
            "rows": num_rows,
            "rows_per_second": round(rate),
            "ours_is_faster_by": round(rates[ours] / rate, 1),
        }
        for name, rate in rates.items()
    ]


def _fit_lightgbm(
    matrix: NDArray[np.float32], names: Sequence[str], num_trees: int, rng: np.random.Generator
) -> str:
    """Return a booster of the size of a published one, fitted on noise."""
    noise = rng.standard_normal(len(matrix))
    target = (matrix[:, :50].sum(axis=1) + 3 * noise > 10).astype(np.int8)
    size = {
        "num_rounds": num_trees,
        "num_leaves": LEAVES,
        "max_depth": -1,
        "feature_fraction_bynode": 0.1,
    }
    parameters = parameters_of("lightgbm", size)
    return LIBRARIES["lightgbm"].fit(matrix, target, names, parameters, 0)


def _rates_in_turns(
    calls: Mapping[str, Callable[[], Any]], num_rows: int, repeats: int
) -> dict[str, float]:
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            rates[name].append(num_rows / seconds_of(call))
    return {name: statistics.median(values) for name, values in rates.items()}
