"""A network's score of a lesion, from the logits of its folds' models.

Fold models differ in the scale of their logits, so each model's logits are standardised by mean and
deviation of the training rows that it held out. A training row gets the score of the model that
held it out, a test row the mean over all models, and an unreadable image a blank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.embedding.store import (
    ORIGIN_KEYS,
    Embeddings,
    read_run,
    refuse_missing_embeddings,
    scan_embeddings,
)
from isic import schema
from isic.dataset import Split
from isic.folds import Folds
from isic.layout import TRAINED_ON_FILE, fold_dir
from isic.provenance import read_seen, refuse_seen
from isic.runtime.errors import UserError
from isic.tables import reading


@dataclass(frozen=True)
class LogitScaler:
    """Mean and deviation of each fold model's out-of-fold logits."""

    folds: Mapping[int, tuple[float, float]]

    def standardised(self) -> pl.Expr:
        """Return (logit - mean) / deviation, with the constants of the row's `fold`."""
        means, deviations = zip(*self.folds.values(), strict=True)
        mean = self._of_fold(means)
        deviation = self._of_fold(deviations)
        return (pl.col("logit") - mean) / deviation

    def _of_fold(self, values: Sequence[float]) -> pl.Expr:
        folds = pl.Series(list(self.folds), dtype=pl.Int8)
        return pl.col("fold").replace_strict(folds, pl.Series(values, dtype=pl.Float64))

    def to_json(self) -> dict[str, list[float]]:
        return {str(fold): list(pair) for fold, pair in self.folds.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "LogitScaler":
        return cls({int(fold): (pair[0], pair[1]) for fold, pair in value.items()})


def fit_logit_scaler(logits: pl.DataFrame) -> LogitScaler:
    """Learn the constants from out-of-fold `isic_id`, `fold`, `logit`.

    Equal logits get deviation 1.
    """
    logit = pl.col("logit").cast(pl.Float64)
    deviation = pl.when(logit.std() > 0).then(logit.std()).otherwise(1.0)
    table = (
        # Sorted, because the last bits of a sum depend on its order.
        logits.sort("fold", schema.ID)
        .group_by("fold", maintain_order=True)
        .agg(logit.mean().alias("mean"), deviation.alias("std"))
    )
    return LogitScaler({fold: (mean, std) for fold, mean, std in table.iter_rows()})


def oof_logits(root: Embeddings, metadata: pl.DataFrame, folds: Folds) -> pl.DataFrame:
    """Read each training row's logit from the model that held it out.

    Returns:
        `isic_id`, `fold` and `logit` Float64 in the order of `metadata`; null for an unreadable
        image.

    Raises:
        UserError: the embeddings lack rows.
    """
    wanted = metadata.select(schema.ID).with_columns(folds.of(metadata).alias("fold"))
    return _join_logits(wanted, root, "train")


def scoring_logits(
    root: Embeddings, split: Split, metadata: pl.DataFrame, fold_ids: Sequence[int]
) -> pl.DataFrame:
    """Read the logits of several folds' models for every row.

    Returns:
        As `oof_logits`, but with one row per row of `metadata` and fold.

    Raises:
        UserError: the embeddings lack rows or folds.
    """
    folds = pl.DataFrame({"fold": pl.Series(fold_ids, dtype=pl.Int8)})
    wanted = metadata.select(schema.ID).join(folds, how="cross", maintain_order="left_right")
    return _join_logits(wanted, root, split)


def _join_logits(wanted: pl.DataFrame, root: Embeddings, split: Split) -> pl.DataFrame:
    """Add the logits to `isic_id` and `fold`. Raise UserError if readable images lack one."""
    logits = _read_logits(root, split, wanted)
    table = wanted.join(logits, on=[schema.ID, "fold"], how="left", maintain_order="left")
    missing = table.filter(pl.col("logit").is_null())
    refuse_missing_embeddings(missing, table[schema.ID].n_unique(), root, split)
    return table


def _read_logits(root: Embeddings, split: Split, wanted: pl.DataFrame) -> pl.DataFrame:
    """Read `isic_id`, `fold` and `logit` Float64 of the embeddings of `isic_id` and `fold`.

    Raises:
        UserError: a logit is not finite, or there are several per image and fold.
    """
    stored = scan_embeddings(root, split, ["logit"]).with_columns(pl.col("logit").cast(pl.Float64))
    with reading(str(root)):
        # Before the checks: a run may hold every image by every fold's model.
        logits = stored.join(wanted.lazy(), on=[schema.ID, "fold"], how="semi").collect()
    not_finite = logits.filter(~pl.col("logit").is_finite().fill_null(False))
    if len(not_finite):
        raise UserError(
            f"{root}: {len(not_finite)} {split} logits are not finite (first: "
            f"{not_finite[schema.ID][0]}); train and export the model again"
        )
    repeated = logits.filter(pl.struct(schema.ID, "fold").is_duplicated())
    if len(repeated):
        raise UserError(
            f"{root}: {repeated[schema.ID][0]} has more than one {split} logit of fold "
            f"{repeated['fold'][0]}; embed again into an empty folder"
        )
    return logits


def refuse_leaks(root: Path, metadata: pl.DataFrame, folds: Folds) -> None:
    """Raise a UserError if a fold's model has learned from rows that it scores."""
    # The fold plan does not rule this out: the model's initial weights may have been trained on
    # rows that the plan holds out.
    fold = folds.of(metadata)
    for k in read_run(root, "train")["folds"]:
        refuse_seen(
            metadata.filter(fold == k),
            read_seen(fold_dir(root / "train", k) / TRAINED_ON_FILE),
            f"the model of fold {k} behind {root}",
            "train it again from other weights",
        )


def mean_scores(logits: pl.DataFrame, scaler: LogitScaler, metadata: pl.DataFrame) -> pl.Series:
    """Return [N] Float64 the mean of each row's standardised logits, in the order of `metadata`.

    The mean is over the folds that have a logit for the row, null if none has.
    """
    # Sorted, because the last bits of a mean depend on its order.
    score = (
        logits.select(schema.ID, "fold", scaler.standardised().alias("score"))
        .sort(schema.ID, "fold")
        .group_by(schema.ID, maintain_order=True)
        .agg(pl.col("score").mean())
    )
    rows = metadata.select(schema.ID)
    return rows.join(score, on=schema.ID, how="left", maintain_order="left")["score"]


def image_probability(scores: pl.DataFrame) -> NDArray[np.float64]:
    """Return [N] the logistic function of the mean over networks' scores [N, K], in (0, 1).

    A row without a score counts as 0, the mean of the training rows.
    """
    score = scores.select(pl.mean_horizontal(pl.all()).fill_null(0.0)).to_series().to_numpy()
    return np.asarray(1 / (1 + np.exp(-score)))


def read_origin(root: Embeddings, split: Split, folds_digest: str) -> dict[str, Any]:
    """Return an embedding run's folds, fold plan, engines, ORIGIN_KEYS and pretrained weights.

    Raises:
        UserError: there is no such run, or it has another fold plan.
    """
    run = read_run(root, split)
    if run.get("folds_digest") != folds_digest:
        raise UserError(
            f"the {split} embeddings in {root} were made with the fold plan "
            f"{run.get('folds_digest')}, not {folds_digest}; "
            "use the embeddings of the same training run"
        )
    keys = ("folds", "folds_digest", "engines", *ORIGIN_KEYS, "pretrained")
    return {key: run.get(key) for key in keys}
