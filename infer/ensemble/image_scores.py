"""The image model's score as a feature of a lesion.

Fold models differ in the scale of their logits, so each fold's are standardised by the mean and deviation of the
training rows that it held out, before they stand in one column. A training row has the score of the one model that
never saw its patient; a test row has the mean over all fold models. An image that the embedding run could not read
has a blank score.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.embedding.store import ERRORS_FILE, ORIGIN, fold_dir, load, read_run
from isic import schema
from isic.dataset import Split
from isic.folds import Folds
from isic.metadata import with_patient
from isic.provenance import SEEN_FILE, read_seen, refuse_seen
from isic.runtime.errors import UserError
from isic.tables import read_parquet, reading

SCORE = "image_score"
RELATIVE = "image_score_patient_diff"
FEATURES = (SCORE, RELATIVE)


@dataclass(frozen=True)
class Standard:
    """Mean and deviation of each fold model's out-of-fold logits."""

    folds: Mapping[int, tuple[float, float]]

    def apply(self) -> pl.Expr:
        """Returns (logit - mean) / std by the row's `fold`."""
        keys = list(self.folds)
        mean, std = (
            pl.Series([pair[i] for pair in self.folds.values()], dtype=pl.Float64) for i in (0, 1)
        )
        codes = pl.Series(keys, dtype=pl.Int8)
        fold = pl.col("fold")
        return (pl.col("logit") - fold.replace_strict(codes, mean)) / fold.replace_strict(
            codes, std
        )

    def to_json(self) -> dict[str, list[float]]:
        return {str(fold): list(pair) for fold, pair in self.folds.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Standard":
        return cls({int(fold): (pair[0], pair[1]) for fold, pair in value.items()})


def fit_standard(logits: pl.DataFrame) -> Standard:
    """Learns the constants from out-of-fold `fold` and `logit`. A fold of equal logits has deviation 1."""
    logit = pl.col("logit").cast(pl.Float64)
    std = pl.when(logit.std() > 0).then(logit.std()).otherwise(1.0)
    table = (
        logits.sort("fold", schema.ID)
        .group_by("fold", maintain_order=True)
        .agg(logit.mean().alias("mean"), std.alias("std"))
    )
    return Standard({fold: (mean, deviation) for fold, mean, deviation in table.iter_rows()})


def oof_logits(root: Path, metadata: pl.DataFrame, folds: Folds) -> pl.DataFrame:
    """Reads each training row's logit from the model of the fold that held it out.

    Returns:
        `isic_id`, `fold` and `logit` Float64 in the order of `metadata`; null for an image that could not be read.

    Raises:
        UserError: the embeddings are of another fold plan, or lack rows.
    """
    made_with(root, "train", folds.digest)
    logits = _read(root, "train")
    plan = metadata.select(schema.ID).with_columns(folds.of(metadata).alias("fold"))
    table = plan.join(logits, on=[schema.ID, "fold"], how="left", maintain_order="left")
    _refuse_blank(table, root, "train")
    return table


def refuse_leaks(root: Path, metadata: pl.DataFrame, folds: Folds) -> None:
    """Raises a UserError if the model of a fold has learned from rows that it scores.

    The fold plan alone does not show this: the weights that the model started from may have met
    rows which the plan holds out.

    Args:
        root: an embedding run.
        metadata: the training table.
        folds: its fold plan.
    """
    fold = folds.of(metadata)
    for k in read_run(root, "train")["folds"]:
        refuse_seen(
            metadata.filter(fold == k),
            read_seen(fold_dir(root, "train", k) / SEEN_FILE),
            f"the model of fold {k} behind {root}",
            "train it again from other weights",
        )


def scoring_logits(
    root: Path, split: Split, metadata: pl.DataFrame, folds_digest: str, standard: Standard
) -> pl.DataFrame:
    """Reads the logits of every fold model for the rows to score.

    Returns:
        `isic_id`, `fold` and `logit` Float64, null as above; each row of `metadata` stands once a fold.

    Raises:
        UserError: the embeddings are of another fold plan, or lack rows or folds.
    """
    made_with(root, split, folds_digest)
    logits = _read(root, split)
    every = pl.DataFrame({"fold": pl.Series(list(standard.folds), dtype=pl.Int8)})
    table = metadata.select(schema.ID).join(every, how="cross", maintain_order="left_right")
    table = table.join(logits, on=[schema.ID, "fold"], how="left", maintain_order="left")
    _refuse_blank(table, root, split)
    return table


def image_features(
    logits: pl.DataFrame, standard: Standard, metadata: pl.DataFrame
) -> pl.DataFrame:
    """Returns `isic_id` and FEATURES Float32 in the order of `metadata`.

    The score is the mean over the folds that have one for the row; relative is its difference from the mean over the
    patient's lesions. A ratio, as others use, has no meaning for a score around zero.
    """
    score = logits.with_columns(standard.apply().alias(SCORE)).sort(schema.ID, "fold")
    score = score.group_by(schema.ID, maintain_order=True).agg(pl.col(SCORE).mean())
    patient = with_patient(metadata.select(pl.col(schema.ID, f"^{schema.PATIENT}$")))
    table = patient.join(score, on=schema.ID, how="left", maintain_order="left").with_row_index(
        "_row"
    )
    table = table.sort(schema.PATIENT, schema.ID)
    relative = pl.col(SCORE) - pl.col(SCORE).mean().over(schema.PATIENT)
    table = table.with_columns(relative.alias(RELATIVE)).sort("_row")
    return table.select(schema.ID, pl.col(FEATURES).cast(pl.Float32))


def probability(table: pl.DataFrame) -> NDArray[np.float64]:
    """Returns [N] the logistic function of the image score: what the image model says alone, in (0, 1).

    A blank score counts as 0, the mean of the training rows.
    """
    score = table[SCORE].fill_null(0.0).to_numpy().astype(np.float64)
    return np.asarray(1 / (1 + np.exp(-score)))


def made_with(root: Path, split: Split, folds_digest: str) -> dict[str, Any]:
    """Returns what an embedding run says of itself: folds, fold plan, the engines' digests, and ORIGIN.

    Raises:
        UserError: there is no such run, or its fold plan is another one.
    """
    run = read_run(root, split)
    if run.get("folds_digest") != folds_digest:
        raise UserError(
            f"the {split} embeddings in {root} were made with the fold plan {run.get('folds_digest')}, this is "
            f"{folds_digest}; use the embeddings of the same training run"
        )
    return {key: run.get(key) for key in ("folds", "folds_digest", "engines", *ORIGIN)}


def _read(root: Path, split: Split) -> pl.DataFrame:
    """Returns `isic_id`, `fold` and `logit` Float64 of every row that the embeddings have."""
    stored = load(root, split, ["logit"]).with_columns(pl.col("logit").cast(pl.Float64))
    with reading(root):
        logits = stored.collect()
    wrong = logits.filter(~pl.col("logit").is_finite().fill_null(False))
    if len(wrong):
        raise UserError(
            f"{root}: {len(wrong)} {split} logits are not finite, the first is of {wrong[schema.ID][0]}; "
            "train and export the model again"
        )
    repeated = logits.filter(pl.struct(schema.ID, "fold").is_duplicated())
    if len(repeated):
        raise UserError(
            f"{root}: {repeated[schema.ID][0]} has more than one {split} logit of fold {repeated['fold'][0]}; "
            "embed again into an empty folder"
        )
    return logits


def _refuse_blank(table: pl.DataFrame, root: Path, split: Split) -> None:
    refuse_gaps(table.filter(pl.col("logit").is_null()), table[schema.ID].n_unique(), root, split)


def refuse_gaps(gaps: pl.DataFrame, num_images: int, root: Path, split: Split) -> None:
    """Raises a UserError where an embedding is missing, unless the run has said of that image that it cannot be used.

    Args:
        gaps: `isic_id` and `fold` of what is missing.
        num_images: how many images there should be.
    """
    errors = root / split / ERRORS_FILE
    if gaps.is_empty():
        return
    skipped = read_parquet(errors)[schema.ID] if errors.is_file() else pl.Series(dtype=pl.String)
    gaps = gaps.filter(~pl.col(schema.ID).is_in(skipped.implode()))
    if len(gaps):
        raise UserError(
            f"{root} lacks the {split} embeddings of {gaps[schema.ID].n_unique()} of {num_images} "
            f"images, the first is {gaps[schema.ID][0]} for fold {gaps['fold'][0]}; "
            f"run `python -m infer embed --split {split}` on all of them, for every fold"
        )
