"""Embeddings on disk: Parquet parts by split and fold, written whole or not at all, and read back as one table.

`<root>/<split>/fold_<k>/part-00000.parquet` hold `isic_id`, `features` (fixed-size list) and `logit`;
`<root>/<split>/run.json` says what they were made with, and `<root>/folds.parquet` which fold held out which row.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from isic.dataset import Split
from isic.errors import UserError
from isic.files import atomic_path, read_json

PLAN_FILE, RUN_FILE = "plan.json", "run.json"
ERRORS_FILE = "errors.parquet"


def fold_dir(root: Path, split: Split, fold: int) -> Path:
    return root / split / f"fold_{fold}"


def part_path(root: Path, split: Split, fold: int, part: int) -> Path:
    return fold_dir(root, split, fold) / f"part-{part:05d}.parquet"


def write_part(path: Path, ids: Sequence[str], features: NDArray[np.floating], logits: NDArray[np.float32]) -> None:
    """Writes one part, atomically and with bytes that depend on nothing but the arguments.

    Args:
        ids: N ids.
        features: [N, D] float16 or float32; stored in that type.
        logits: [N] float32.
    """
    inner = pl.Float16 if features.dtype == np.float16 else pl.Float32
    table = pl.DataFrame(
        {
            "isic_id": pl.Series(list(ids), dtype=pl.String),
            "features": pl.Series(features, dtype=pl.Array(inner, features.shape[1])),
            "logit": pl.Series(logits, dtype=pl.Float32),
        }
    )
    with atomic_path(path) as temporary:
        table.write_parquet(temporary, compression="zstd", statistics=False)


def read_run(root: Path, split: Split) -> dict[str, Any]:
    """Reads what a finished embedding run says of itself. Raises UserError where there is none."""
    path = root / split / RUN_FILE
    if not path.is_file():
        raise UserError(f"{root} has no finished {split} embeddings; run `python -m infer embed --split {split}` first")
    return read_json(path)


def load(root: Path, split: Split, columns: Iterable[str] = ("features", "logit")) -> pl.LazyFrame:
    """Reads the embeddings of a split back.

    Returns:
        `isic_id` String, `fold` Int8 (whose model made the row) and the wanted columns. A train image stands once,
        under the fold that held it out; a test image stands once a fold.

    Raises:
        UserError: the run is not finished, or a fold it names has no parts.
    """
    run = read_run(root, split)
    frames = []
    for fold in run["folds"]:
        parts = sorted(fold_dir(root, split, fold).glob("part-*.parquet"))
        if not parts:
            raise UserError(f"{fold_dir(root, split, fold)} has no parts; run `python -m infer embed` again")
        frame = pl.scan_parquet(parts).select("isic_id", pl.lit(fold, dtype=pl.Int8).alias("fold"), *columns)
        frames.append(frame)
    return pl.concat(frames)
