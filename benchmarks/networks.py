"""`python -m benchmarks networks`: CPU time and memory of the features of several networks.

The embeddings are random numbers, as `infer embed --folds all` would write them.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.record import Row, print_and_append
from benchmarks.settings import NetworksSettings
from benchmarks.tabular import write_synthetic_table
from benchmarks.timing import batches
from infer.embedding.shards import SHARD_ROWS
from infer.embedding.store import RUN_FILE, shard_path, write_shard
from infer.ensemble.features.spec import FeatureSpec
from infer.ensemble.images.features import fit_images
from infer.ensemble.settings import NUM_FOLDS, SPLIT_SEED
from isic import schema
from isic.folds import Folds, draw_folds
from isic.layout import FOLDS_FILE, TRAINED_ON_FILE, fold_dir
from isic.metadata import read_metadata
from isic.provenance import seen_rows, write_seen
from isic.runtime.files import write_json
from isic.runtime.machine import peak_memory_mb


def networks(settings: NetworksSettings) -> None:
    """Run `benchmarks networks`, which its settings describe."""
    with tempfile.TemporaryDirectory() as name:
        table = write_synthetic_table(Path(name), settings.rows)
        roots = write_networks(Path(name), table, settings.networks, settings.width)
        for features in settings.features:
            words = features.replace("+", ",")
            costs = [measure_alone(words, table, roots) for _ in range(settings.repeats)]
            row = {
                "features": features,
                "networks": settings.networks,
                "width": settings.width,
                "rows": settings.rows,
                **summarise_costs(costs),
            }
            print_and_append("networks", [row], settings.results)


def write_networks(folder: Path, table: Path, number: int, width: int) -> list[Path]:
    """Write random embeddings of every row by every fold of some networks. Return their folders."""
    metadata = read_metadata(table)
    folds = draw_folds(metadata, NUM_FOLDS, SPLIT_SEED)
    roots = [folder / f"network_{index}" for index in range(number)]
    for index, root in enumerate(roots):
        folds.write(root / FOLDS_FILE)
        for k in range(NUM_FOLDS):
            _write_fold(root, k, metadata, folds, np.random.default_rng((index, k)), width)
        write_json(root / "train" / RUN_FILE, _run(root.name, folds, width))
    return roots


def _write_fold(
    root: Path,
    fold: int,
    metadata: pl.DataFrame,
    folds: Folds,
    random: np.random.Generator,
    width: int,
) -> None:
    for shard, ids in enumerate(batches(metadata[schema.ID].to_list(), SHARD_ROWS)):
        features = random.standard_normal((len(ids), width), dtype=np.float32)
        path = shard_path(root, "train", fold, shard)
        write_shard(path, ids, features.astype(np.float16), features[:, 0])
    trained_on = metadata.filter(folds.of(metadata) != fold)
    write_seen(fold_dir(root / "train", fold) / TRAINED_ON_FILE, seen_rows(trained_on))


def _run(name: str, folds: Folds, width: int) -> Row:
    models = {str(k): name for k in range(folds.num_folds)}
    return {
        "config": name,
        "folds": list(range(folds.num_folds)),
        "folds_digest": folds.digest,
        "folds_mode": "all",
        "engines": models,
        "checkpoints": models,
        "tta": "none",
        "preprocess": {},
        "num_features": width,
    }


def measure_alone(words: str, table: Path, roots: Sequence[Path]) -> Row:
    """Return the seconds, CPU seconds, peak memory and columns of features, in a new process."""
    # spawn: a forked child would inherit this process's memory and count it in its peak.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, words, table, roots).result()


def _measure(words: str, table: Path, roots: Sequence[Path]) -> Row:
    metadata = read_metadata(table)
    spec = FeatureSpec.parse(words)
    started = time.perf_counter()
    cpu_started = time.process_time()
    _, images = fit_images(spec.forms, roots, (), metadata)
    features = spec.frame(metadata, images.tables())
    return {
        "columns": features.width - 1,  # without isic_id
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "peak_mb": peak_memory_mb(),
    }


def summarise_costs(costs: Sequence[Row]) -> Row:
    """Return the medians of the seconds, and the largest peak."""
    medians = {
        name: round(statistics.median(cost[name] for cost in costs), 2)
        for name in ("seconds", "cpu_seconds")
    }
    peaks = [cost["peak_mb"] for cost in costs if cost["peak_mb"]]
    return {"columns": costs[0]["columns"], **medians, "peak_mb": max(peaks, default=None)}
