"""Embeddings on disk: Parquet parts by split and fold, written whole or not at all, and read back as one table.

`<root>/<split>/fold_<k>/part-00000.parquet` hold `isic_id`, `features` (fixed-size list) and `logit`;
`<root>/<split>/run.json` says what they were made with, and `<root>/folds.parquet` which fold held out which row.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from isic import schema
from isic.dataset import Split
from isic.runtime.errors import UserError
from isic.runtime.files import digest, read_json, write_parquet
from isic.tables import parquet_metadata, scan_parquet

PLAN_FILE, RUN_FILE = "plan.json", "run.json"
ERRORS_FILE = "errors.parquet"
ERRORS = {"isic_id": pl.String, "reason": pl.String}
"""Schema of ERRORS_FILE."""
PLAN_KEY = "plan_digest"
"""What says in a run's JSON and in the metadata of each of its parts which plan made it."""
SLICE_ROWS = 32768
"""Ids that are looked at together where a full-size table of them would cost memory."""


def fold_dir(root: Path, split: Split, fold: int) -> Path:
    return root / split / f"fold_{fold}"


def part_path(root: Path, split: Split, fold: int, part: int) -> Path:
    return fold_dir(root, split, fold) / f"part-{part:05d}.parquet"


def write_part(
    path: Path,
    ids: Sequence[str],
    features: NDArray[np.floating],
    logits: NDArray[np.float32],
    plan_digest: str | None = None,
) -> None:
    """Writes one part, atomically and with bytes that depend on nothing but the arguments.

    Args:
        ids: N ids.
        features: [N, D] float16 or float32; stored in that type.
        logits: [N] float32.
        plan_digest: of the plan of the run that made it, kept in the file's metadata.
    """
    inner = pl.Float16 if features.dtype == np.float16 else pl.Float32
    table = pl.DataFrame(
        {
            "isic_id": pl.Series(list(ids), dtype=pl.String),
            "features": pl.Series(features, dtype=pl.Array(inner, features.shape[1])),
            "logit": pl.Series(logits, dtype=pl.Float32),
        }
    )
    write_parquet(path, table, {PLAN_KEY: plan_digest} if plan_digest else None)


def ids_digest(ids: pl.Series) -> str:
    """Returns a digest of a table's ids in their order."""
    return digest(
        *(digest(*rows[schema.ID]) for rows in ids.to_frame(schema.ID).iter_slices(SLICE_ROWS))
    )


def read_run(root: Path, split: Split) -> dict[str, Any]:
    """Reads what a finished embedding run says of itself. Raises UserError where there is none."""
    path = root / split / RUN_FILE
    if not path.is_file():
        raise UserError(
            f"{root} has no finished {split} embeddings; run `python -m infer embed --split {split}` first"
        )
    return read_json(path)


ORIGIN = {
    "config": "another config",
    "checkpoints": "other trained weights",
    "tta": "another --tta",
    "preprocess": "another preprocessing",
}
"""What decides which values a run's images get. The engine does not: it has passed the gate against its checkpoint."""


def refuse_other_origin(
    root: Path, split: Split, found: Mapping[str, Any], fitted: Mapping[str, Any]
) -> None:
    """Raises a UserError where embeddings do not mean what those meant that an ensemble was fitted with.

    Args:
        found, fitted: what the run of `root` and the run of then say of themselves, ORIGIN at least.
    """
    for key, what in ORIGIN.items():
        if found.get(key) != fitted.get(key):
            words = (
                f" ({found.get(key)}, not {fitted.get(key)})"
                if isinstance(found.get(key), str)
                else ""
            )
            raise UserError(
                f"the {split} embeddings in {root} were made with {what}{words} than those that the ensemble was "
                "fitted with; embed with the same, or fit again"
            )


def load(root: Path, split: Split, columns: Iterable[str] = ("features", "logit")) -> pl.LazyFrame:
    """Reads the embeddings of a split back.

    Returns:
        `isic_id` String, `fold` Int8 (whose model made the row) and the wanted columns. A train image stands once,
        under the fold that held it out; a test image stands once a fold.

    Collect the table inside `isic.tables.reading`: a part may turn out to be damaged only then.

    Raises:
        UserError: the run is not finished, a fold it names has no parts, or a part is of another run or cannot be read.
    """
    run = read_run(root, split)
    frames = []
    for fold in run["folds"]:
        parts = sorted(fold_dir(root, split, fold).glob("part-*.parquet"))
        if not parts:
            raise UserError(
                f"{fold_dir(root, split, fold)} has no parts; run `python -m infer embed` again"
            )
        _check_origin(parts, run)
        frame = scan_parquet(parts).select(
            "isic_id", pl.lit(fold, dtype=pl.Int8).alias("fold"), *columns
        )
        frames.append(frame)
    return pl.concat(frames)


def _check_origin(parts: Iterable[Path], run: Mapping[str, Any]) -> None:
    """Raises a UserError unless each part can be opened and says that it was made by the plan of this run."""
    for path in parts:
        made_by = parquet_metadata(path).get(PLAN_KEY)
        if made_by != run.get(PLAN_KEY):
            raise UserError(
                f"{path} was made by another run than the one beside it; embed again with --force"
            )
