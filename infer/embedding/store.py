"""Embeddings on disk: Parquet shards per split and fold, read back as one table.

| file | content |
| --- | --- |
| `<root>/<split>/fold_<k>/part-00000.parquet` | `isic_id`, `features` (fixed-size list), `logit` |
| `<root>/<split>/errors.parquet` | the images that could not be used, with the reason |
| `<root>/<split>/run.json` | the settings, inputs and speed of a finished run |
| `<root>/<split>/plan.json` | the settings and inputs of a run, also of an unfinished one |
| `<root>/folds.parquet` | which fold held out which row |

Shards of a backbone without a lesion head, which `export --model` makes, have no `logit`; they are
in `fold_none`. Shards of a network that was trained with `--aux` also have a column `aux.<name>`
(Float32) per auxiliary target: its logit, higher for a row that is more likely to have the target.
`run.json` then holds the definitions by name as `aux`, such as `{"mel": "iddx_full ~ Melanoma"}`,
in the order of the columns. Other embeddings have neither.

`<root>` is `<output_dir>/<config>` for the numbered folds. Embeddings of the test split by the
network that was trained on every row are in `<output_dir>/<config>_all`, in `test/fold_all/`.
`<split>` is train, test, or images for those of `--images`, which need no fold plan.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from infer.embedding.outputs import NamedOutputs
from isic import schema
from isic.dataset import Split
from isic.layout import AUX_PREFIX, ERRORS_FILE, NONE, Fold, fold_dir, fold_number
from isic.runtime.errors import UserError
from isic.runtime.fields import Count, Fields, Index, read_fields
from isic.runtime.files import digest
from isic.tables import parquet_metadata, read_parquet, reading, scan_parquet, write_parquet

LOGIT = "logit"
"""The column of the lesion's logit."""
RUN_SPEC_FILE = "plan.json"
RUN_FILE = "run.json"
IMAGES: Final = "images"
"""The images of `--images`, which are no split of a dataset."""
EmbeddedSplit = Split | Literal["images"]
Embeddings: TypeAlias = Path | NamedOutputs
"""An embedding run: its folder, or the outputs of the images to score in memory."""
BAD_IMAGES_SCHEMA = {"isic_id": pl.String, "reason": pl.String}
RUN_SPEC_KEY = "plan_digest"
"""Key of the run spec's digest in a run's JSON files and in the metadata of its shards."""
# All 400,000 ids at once would be a large list of Python strings.
SLICE_ROWS = 32768
"""Ids that are hashed together."""


def shard_path(root: Path, split: EmbeddedSplit, fold: Fold, shard: int) -> Path:
    return fold_dir(root / split, fold) / f"part-{shard:05d}.parquet"


def write_shard(
    path: Path,
    ids: Sequence[str],
    features: NDArray[np.floating],
    logits: NDArray[np.float32] | None,
    run_spec_digest: str | None = None,
    aux: Mapping[str, NDArray[np.float32]] | None = None,
) -> None:
    """Write one shard atomically; equal arguments give equal bytes.

    Args:
        ids: [N].
        features: [N, D] float16 or float32, stored in that type.
        logits: [N] float32; None if the network has no lesion head.
        run_spec_digest: for the file's metadata.
        aux: [N] float32, the logits of auxiliary targets by name.
    """
    inner = pl.Float16 if features.dtype == np.float16 else pl.Float32
    table = pl.DataFrame(
        {
            "isic_id": pl.Series(list(ids), dtype=pl.String),
            "features": pl.Series(features, dtype=pl.Array(inner, features.shape[1])),
            **({} if logits is None else {LOGIT: pl.Series(logits, dtype=pl.Float32)}),
            **{
                AUX_PREFIX + name: pl.Series(values, dtype=pl.Float32)
                for name, values in (aux or {}).items()
            },
        }
    )
    metadata = {RUN_SPEC_KEY: run_spec_digest} if run_spec_digest else None
    # zstd would save 9 % of the bytes of features, and take two to four times as long.
    write_parquet(path, table, metadata, compression="lz4")


def ids_digest(ids: pl.Series) -> str:
    """Return a digest of a table's ids and their order."""
    slices = ids.to_frame(schema.ID).iter_slices(SLICE_ROWS)
    return digest(*(digest(*rows[schema.ID]) for rows in slices))


def read_run(root: Embeddings, split: EmbeddedSplit) -> dict[str, Any]:
    """Read the `run.json` of a finished embedding run. Raise UserError if there is none."""
    if isinstance(root, NamedOutputs):
        return root.run
    path = root / split / RUN_FILE
    if not path.is_file():
        raise UserError(
            f"{root} has no finished {split} embeddings; "
            f"run `python -m infer embed --split {split}` first"
        )
    run = read_fields(path, RunFields, "embed again with --force")
    refuse_changed_spec(path, run)
    return run


class RunFields(Fields):
    """The fields of `run.json` that readers of embeddings use."""

    config: str
    folds: list[Index | Literal["all", "none"]]
    folds_mode: str = "oof"
    folds_digest: str | None = None
    engines: dict[str, str] = Field({})
    checkpoints: dict[str, str] = Field({})
    num_features: Count = 1
    aux: dict[str, str] = Field({})
    pretrained: dict[str, Any] | None = None


def refuse_changed_spec(path: Path, value: Mapping[str, Any]) -> None:
    """Raise a UserError if the run spec in a JSON file is not the one of its digest."""
    if RUN_SPEC_KEY not in value:  # of tests and of earlier versions
        return
    keys = list(value)
    spec = {key: value[key] for key in keys[: keys.index(RUN_SPEC_KEY)]}
    if digest(json.dumps(spec)) != value[RUN_SPEC_KEY]:
        raise UserError(f"{path} was changed after it was written; embed again with --force")


def refuse_without_head(root: Embeddings, run: Mapping[str, Any]) -> None:
    """Raise a UserError if an embedding run is by a backbone without a lesion head."""
    if run.get("folds") == [NONE]:
        raise UserError(
            f"{root} is of a backbone without a lesion head, so it has features, but neither a "
            "score nor folds; use it by --features frozen or frozen_pca with --frozen, or give "
            "embeddings of a trained network"
        )


# Without the engine: every engine has passed the parity check against its checkpoint.
ORIGIN_KEYS = {
    "config": "another config",
    "checkpoints": "other trained weights",
    "tta": "another --tta",
    "preprocess": "another preprocessing",
}
"""Fields of `run.json` that determine the values of embeddings, with a phrase for a difference."""


def origin_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """Return the phrase for the first of the ORIGIN_KEYS that two origins differ in, if any."""
    phrases = (text for key, text in ORIGIN_KEYS.items() if first.get(key) != second.get(key))
    return next(phrases, None)


def refuse_other_origin(
    root: Embeddings, split: EmbeddedSplit, found: Mapping[str, Any], fitted: Mapping[str, Any]
) -> None:
    """Raise a UserError if embeddings differ in origin from those an ensemble was fitted with.

    `found` and `fitted` have the ORIGIN_KEYS of both.
    """
    for key, difference in ORIGIN_KEYS.items():
        now = found.get(key)
        then = fitted.get(key)
        if now == then:
            continue
        if key == "checkpoints" and isinstance(then, dict) and now and now.items() < then.items():
            lacking = ", ".join(sorted(set(then) - set(now)))
            raise UserError(
                f"the {split} embeddings in {root} lack those by fold {lacking}; export it in the "
                "same format and precision, and embed again"
            )
        values = f" ({now}, not {then})" if isinstance(now, str) else ""
        raise UserError(
            f"the {split} embeddings in {root} were made with {difference}{values} than those "
            "that the ensemble was fitted with; embed with the same, or fit again"
        )


def scan_embeddings(
    root: Embeddings,
    split: EmbeddedSplit,
    columns: Sequence[str] = ("features", LOGIT),
    only_fold: Fold | None = None,
) -> pl.LazyFrame:
    """Scan the embeddings of a split; collect them inside `isic.tables.reading`.

    Returns:
        `isic_id` String, `fold` Int8 (of the model that made the row, as `fold_number` gives it)
        and the given columns: a row per train image, from the fold that held it out, and one per
        test image and fold. With `only_fold`, the rows of that fold's model.

    Raises:
        UserError: the run is not finished, has no logits although they are asked for, one of its
            folds has no shards, or a shard belongs to another run or cannot be read.
    """
    run = read_run(root, split)
    if LOGIT in columns:
        refuse_without_head(root, run)
    if isinstance(root, NamedOutputs):
        return root.scan(columns, only_fold)
    frames = []
    # Chosen here, because a filter of the result would read the features of all folds.
    for fold in run["folds"] if only_fold is None else [only_fold]:
        directory = fold_dir(root / split, fold)
        shards = sorted(directory.glob("part-*.parquet"))
        if not shards:
            raise UserError(f"{directory} has no shards; run `python -m infer embed` again")
        _refuse_other_run(shards, run)
        # The folder has the fold, the file has not.
        number = pl.lit(fold_number(fold), dtype=pl.Int8).alias("fold")
        frames.append(_scan_shards(shards, columns).select("isic_id", number, *columns))
    return pl.concat(frames)


def _scan_shards(shards: Sequence[Path], columns: Sequence[str]) -> pl.LazyFrame:
    """Open shards as one lazy table. Raise UserError if a column is missing or of another type."""
    for path in shards:
        with reading(path):
            found = scan_parquet([path]).collect_schema()
        for name in ("isic_id", *columns):
            if not _has_type(name, found.get(name)):
                raise UserError(
                    f"{path} has {found.get(name) or 'nothing'} as {name}, which no shard of an "
                    "embedding run has; embed again with --force"
                )
    return scan_parquet(shards)


def _has_type(name: str, found: pl.DataType | None) -> bool:
    """Return whether a column of a shard has the type that `write_shard` gives it."""
    if name == schema.ID:
        return found == pl.String
    if name == "features":
        return isinstance(found, pl.Array) and found.inner.is_float() and len(found.shape) == 1
    return found == pl.Float32


def _refuse_other_run(shards: Iterable[Path], run: Mapping[str, Any]) -> None:
    """Raise a UserError if a shard cannot be opened or was made by another run."""
    for path in shards:
        if parquet_metadata(path).get(RUN_SPEC_KEY) != run.get(RUN_SPEC_KEY):
            raise UserError(
                f"{path} was made by another run than the {RUN_FILE} of its split; "
                "embed again with --force"
            )


def refuse_missing_embeddings(
    missing: pl.DataFrame, num_images: int, root: Embeddings, split: EmbeddedSplit
) -> None:
    """Raise a UserError if an embedding is missing of an image that the run could use.

    `missing` has `isic_id` and `fold`.
    """
    if missing.is_empty():
        return
    missing = missing.filter(~pl.col(schema.ID).is_in(_read_skipped(root, split).implode()))
    if len(missing):
        raise UserError(
            f"{root} lacks the {split} embeddings of {missing[schema.ID].n_unique()} of "
            f"{num_images} images, the first is {missing[schema.ID][0]} for fold "
            f"{missing['fold'][0]}; run `python -m infer embed --split {split}` on all of them, "
            "for every fold"
        )


def _read_skipped(root: Embeddings, split: EmbeddedSplit) -> pl.Series:
    """Return the ids of the images that could not be used."""
    if isinstance(root, NamedOutputs):
        return root.skipped
    errors = root / split / ERRORS_FILE
    return read_parquet(errors)[schema.ID] if errors.is_file() else pl.Series(dtype=pl.String)
