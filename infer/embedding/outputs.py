"""Features and logits of images in memory, and their rows as readers of embeddings expect them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from isic import schema
from isic.layout import Fold, fold_number
from isic.runtime.errors import UserError

Float32s = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class FoldOutputs:
    """The outputs of one fold's network for N images; NaN in the rows of images that failed."""

    features: Float32s
    """[N, D], the backbone's output before the head."""
    logits: Float32s | None
    """[N], higher for a lesion that is more likely to be malignant; None of a backbone without a
    lesion head."""
    aux: Mapping[str, Float32s] = field(default_factory=dict)
    """[N] the logits of the auxiliary targets by name; empty for a network without any."""


@dataclass(frozen=True, eq=False)
class EmbeddedImages:
    """The outputs for N images in the order in which they were given."""

    by_fold: Mapping[Fold, FoldOutputs]
    """The outputs of each fold's network."""
    failed: Mapping[int, str]
    """The reason by index for each image that cannot be used."""
    origin: Mapping[str, Any]
    """The fields of an embedding run's `run.json` that identify the networks."""

    def __len__(self) -> int:
        return len(next(iter(self.by_fold.values())).features)

    @property
    def logits(self) -> Float32s:
        """[N] the mean of the folds' logits.

        Raises:
            UserError: the network is a backbone without a lesion head.
        """
        found = [each.logits for each in self.by_fold.values() if each.logits is not None]
        if not found:
            raise UserError(
                f"{self.origin['config']} is a backbone without a lesion head, so it has features, "
                "but no logits; take the features, or load a trained network"
            )
        return _mean(found)

    @property
    def aux(self) -> dict[str, Float32s]:
        """[N] the mean of the folds' auxiliary logits by name."""
        folds = list(self.by_fold.values())
        return {name: _mean([outputs.aux[name] for outputs in folds]) for name in folds[0].aux}

    @property
    def features(self) -> Float32s:
        """[N, D] the features of the only fold.

        Raises:
            UserError: there are several, and each has a feature space of its own, so that a mean
                over them would say nothing.
        """
        if len(self.by_fold) > 1:
            folds = ", ".join(map(str, self.by_fold))
            raise UserError(
                f"folds {folds} each have features of their own; take by_fold[k].features, or "
                "load one fold only"
            )
        (outputs,) = self.by_fold.values()
        return outputs.features


def _mean(values: Sequence[Float32s]) -> Float32s:
    return np.asarray(np.mean(values, axis=0, dtype=np.float32))


def concatenate(parts: Sequence[EmbeddedImages]) -> EmbeddedImages:
    """Join the outputs of successive images; the indices of failures are those of all images."""
    first = parts[0]
    by_fold = {fold: _join([part.by_fold[fold] for part in parts]) for fold in first.by_fold}
    failed = {row: reason for part in parts for row, reason in part.failed.items()}
    return EmbeddedImages(by_fold, failed, first.origin)


def _join(parts: Sequence[FoldOutputs]) -> FoldOutputs:
    logits = [part.logits for part in parts if part.logits is not None]
    return FoldOutputs(
        np.concatenate([part.features for part in parts]),
        np.concatenate(logits) if logits else None,
        {name: np.concatenate([part.aux[name] for part in parts]) for name in parts[0].aux},
    )


@dataclass(frozen=True, eq=False)
class NamedOutputs:
    """Outputs with the ids of their images: embeddings in memory, for `infer.embedding.store`."""

    ids: pl.Series
    """[N] String."""
    outputs: EmbeddedImages

    def __str__(self) -> str:
        return f"the embeddings of {self.run['config']}"

    @property
    def run(self) -> dict[str, Any]:
        """The fields of `run.json` that readers need."""
        return dict(self.outputs.origin)

    @property
    def skipped(self) -> pl.Series:
        """The ids of the images that could not be used."""
        return self.ids.gather(sorted(self.outputs.failed))

    def scan(self, columns: Sequence[str], only_fold: Fold | None) -> pl.LazyFrame:
        """Return the rows of the images that could be used, as `scan_embeddings` does."""
        wanted = self.outputs.by_fold if only_fold is None else [only_fold]
        return pl.concat([self._rows(fold, columns).lazy() for fold in wanted])

    def _rows(self, fold: Fold, columns: Sequence[str]) -> pl.DataFrame:
        number = pl.lit(fold_number(fold), dtype=pl.Int8).alias("fold")
        values = dict(_columns(self.outputs.by_fold[fold], columns))
        rows = pl.DataFrame({schema.ID: self.ids, **values}).select(schema.ID, number, *values)
        is_usable = np.ones(len(rows), bool)
        is_usable[list(self.outputs.failed)] = False
        return rows.filter(pl.Series(is_usable))


def _columns(outputs: FoldOutputs, columns: Sequence[str]) -> Iterator[tuple[str, pl.Series]]:
    if "features" in columns:
        width = outputs.features.shape[1]
        yield "features", pl.Series(outputs.features, dtype=pl.Array(pl.Float32, width))
    if "logit" in columns:
        yield "logit", pl.Series(outputs.logits)
