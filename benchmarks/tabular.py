"""`python -m benchmarks tabular`: features of a whole table, beside pandas; fitting; and predicting."""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pandas as pd
import polars as pl
from pydantic import Field

from benchmarks.record import write
from infer.ensemble.boosters import LIBRARIES, parameters_of
from infer.ensemble.out_of_fold import undersample
from isic import schema
from isic.features import SETS, compute, fit_encoding
from isic.features.formulas import ERR
from isic.features.relative import EXTREMES, RANKED
from isic.metadata import read_metadata
from isic.runtime.config import Settings, Several
from isic.runtime.files import write_parquet
from isic.runtime.machine import num_cores, peak_memory_mb
from isic.synth.rows import default_positives, draw_rows, num_patients
from isic.tables import read_parquet

WIDE, TREES, LEAVES = 968, 300, 31
"""A matrix and a model of the size that published ensembles with embeddings have."""
FIT_ROWS = 10_000
FEW_ROWS = 200
"""Of a table that costs what a call costs: a plan of two hundred expressions."""
WARM_ROWS = 4_000
"""Gone through before the clock starts, so that threads run and memory is there."""
TOLERANCE = 1e-4


class TabularSettings(Settings):
    """What `python -m benchmarks tabular` takes."""

    rows: Several[int] = Field(
        (4_000, 40_000, 401_059), description="sizes of the synthetic tables"
    )
    predict_rows: int = Field(100_000, ge=1, description="rows of the matrix to predict")
    trees: int = Field(TREES, ge=1, description="trees of the booster to predict with")
    fit_rounds: int | None = Field(
        None, ge=1, description="boosting rounds to fit; each library's own if not given"
    )
    repeats: int = Field(3, ge=1, description="repeats of each, of which the median counts")
    results: Path | None = Field(
        None, description="folder of the CSV; benchmarks/results if not given"
    )


def tabular(settings: TabularSettings) -> None:
    """Measures seconds and memory of the default features, a part of them here and in pandas, fitting, predicting."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        few = _features(write_table(Path(folder), FEW_ROWS), settings.repeats)
        start = {row["what"]: row["seconds"] for row in few}
        for number in settings.rows:
            path = write_table(Path(folder), number)
            features = _features(path, settings.repeats)
            rows += [{**row, "start_seconds": start[row["what"]]} for row in features]
            rows += _fits(path, settings.fit_rounds)
    rows += predict_rates(settings.predict_rows, settings.trees, settings.repeats)
    print(f"appended to {write('tabular', rows, settings.results)}")


def write_table(folder: Path, number: int) -> Path:
    """Writes a synthetic training table of so many rows, without images, and returns its path."""
    path = folder / f"{number}.parquet"
    ids = [f"ISIC_{i:07d}" for i in range(number)]
    patients = [f"IP_{i:07d}" for i in range(num_patients(number))]
    drawn = draw_rows(ids, patients, default_positives(number), np.random.default_rng(0))
    write_parquet(path, drawn.table)
    return path


def _features(path: Path, repeats: int) -> list[dict[str, Any]]:
    """Measures the ways to make features, each repeat in a process of its own, in turns."""
    found: dict[str, list[tuple[float, int | None]]] = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name in WAYS:
            found[name].append(alone(name, path))
    seconds = {
        name: statistics.median(time for time, _ in measured) for name, measured in found.items()
    }
    check_same(path)
    number = len(read_parquet(path, columns=[schema.ID]))
    return [
        {
            "what": name,
            "rows": number,
            "seconds": round(seconds[name], 3),
            "peak_mb": max((peak for _, peak in measured if peak), default=None),
            "ours_is_faster_by": round(seconds[name] / seconds[PART], 1) if name != FULL else None,
        }
        for name, measured in found.items()
    ]


def alone(name: str, path: Path) -> tuple[float, int | None]:
    """Returns the seconds of one way in a new process, its threads running and the table read, and its peak MB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, name, path).result()


def _measure(name: str, path: Path) -> tuple[float, int | None]:
    read, run = WAYS[name]
    table = read(path)
    run(table.head(WARM_ROWS))
    started = time.perf_counter()
    run(table)
    return time.perf_counter() - started, peak_memory_mb()


def _part_names() -> tuple[str, ...]:
    z = (f"{name}_patient_z" for name in schema.NUMERIC)
    ranks = (f"{name}_patient_rank" for name in RANKED)
    extremes = (f"{name}_to_patient_{which}" for name in EXTREMES for which in ("max", "min"))
    return (*z, *ranks, *extremes, "patient_num_lesions", "patient_area_sum")


def compute_part(metadata: pl.DataFrame) -> pl.DataFrame:
    """Returns `isic_id` and the part of the features that `compute_pandas` makes."""
    return compute(metadata, _part_names())


def compute_pandas(
    table: pd.DataFrame, zscore: Callable[[Any, pd.Series], pd.Series]
) -> pd.DataFrame:
    """Returns the same as `compute_part` does; `zscore` takes the column by patient, and as it is."""
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
    """The quick way in pandas: two passes that it has in C."""
    return (column - group.transform("mean")) / (group.transform("std").fillna(0) + ERR)


def zscore_by_function(group: Any, column: pd.Series) -> pd.Series:
    """The short way in pandas: a function that it calls for every patient."""
    return group.transform(lambda x: (x - x.mean()) / ((x.std() if x.count() > 1 else 0) + ERR))


def check_same(path: Path) -> None:
    """Raises an AssertionError where the ways do not give the same values."""
    ours = compute_part(read_metadata(path))
    for zscore in (zscore_by_name, zscore_by_function):
        theirs = compute_pandas(pd.read_parquet(path), zscore)
        assert ours[schema.ID].to_list() == theirs[schema.ID].to_list()
        for name in _part_names():
            values = theirs[name].to_numpy(np.float64)
            np.testing.assert_allclose(
                ours[name].to_numpy(), values, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name
            )


FULL, PART = "default features", "part of them"
PANDAS, PANDAS_FUNCTION = (
    'the part in pandas, transform("mean")',
    "the part in pandas, transform(lambda)",
)
WAYS: dict[str, tuple[Callable[[Path], Any], Callable[[Any], Any]]] = {
    FULL: (read_metadata, lambda table: compute(table, SETS["engineered"])),
    PART: (read_metadata, compute_part),
    PANDAS: (pd.read_parquet, lambda table: compute_pandas(table, zscore_by_name)),
    PANDAS_FUNCTION: (pd.read_parquet, lambda table: compute_pandas(table, zscore_by_function)),
}
"""How to read the table, and what is timed."""


def _fits(path: Path, rounds: int | None) -> list[dict[str, Any]]:
    """Measures one booster of each library on a fold's rows after undersampling, on one thread."""
    metadata = read_metadata(path)
    target = metadata[schema.TARGET].to_numpy()
    rows = undersample(target, np.arange(len(target)), 100.0, (0, 0))
    features = compute(metadata, SETS["engineered"])[rows]
    matrix = fit_encoding(features, SETS["engineered"]).transform(features)
    changes = {"num_rounds": rounds} if rounds else {}
    measured = []
    for name, library in LIBRARIES.items():
        started = time.perf_counter()
        library.fit(matrix, target[rows], SETS["engineered"], parameters_of(name, changes), 0)
        seconds = round(time.perf_counter() - started, 2)
        measured.append({"what": f"{name}, one booster", "rows": len(rows), "seconds": seconds})
    return measured


def predict_rates(num_rows: int, num_trees: int, repeats: int) -> list[dict[str, Any]]:
    """Measures LightGBM's predictions of WIDE columns on all cores, in turns.

    Ours are from a C-ordered float32 matrix, the others from an Arrow table, as LightGBM takes one.
    """
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((num_rows, WIDE), dtype=np.float32)
    fitted_on = matrix[:FIT_ROWS]
    target = (fitted_on[:, :50].sum(axis=1) + rng.standard_normal(len(fitted_on)) * 3 > 10).astype(
        np.int8
    )
    shape = {
        "num_rounds": num_trees,
        "num_leaves": LEAVES,
        "max_depth": -1,
        "feature_fraction_bynode": 0.1,
    }
    names = [f"f{i}" for i in range(WIDE)]
    library = LIBRARIES["lightgbm"]
    text = library.fit(fitted_on, target, names, parameters_of("lightgbm", shape), 0)
    predict, booster, table = (
        library.load(text),
        lightgbm.Booster(model_str=text),
        pl.from_numpy(matrix, names),
    )
    arrow = table.to_arrow()
    what = f"predict, {num_trees} trees, {WIDE} features"
    ways: dict[str, Callable[[], Any]] = {
        what: lambda: predict(matrix, num_cores()),
        f"{what}, from an Arrow table": lambda: booster.predict(arrow),
    }
    np.testing.assert_allclose(*(run() for run in ways.values()))  # warms up, too
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            rates[name].append(num_rows / (time.perf_counter() - started))
    medians = {name: statistics.median(measured) for name, measured in rates.items()}
    return [
        {
            "what": name,
            "rows": num_rows,
            "rows_per_second": round(rate),
            "ours_is_faster_by": round(medians[what] / rate, 1),
        }
        for name, rate in medians.items()
    ]
