"""The features of training rows, with noise on those that boosters must not trust too much."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

NoisyColumns = Callable[[tuple[int, int]], pl.DataFrame]
"""Makes columns [N] from the seed and fold of a booster."""


@dataclass(frozen=True)
class TrainingTable:
    """The features of N rows."""

    features: pl.DataFrame
    """As held-out rows are scored by."""
    noisy: NoisyColumns | None = None
    """The columns that are replaced in the rows that a booster is fitted on."""

    def take(self, rows: NDArray[np.int64], seed: int, fold: int) -> pl.DataFrame:
        """Return the features of some rows as a booster is fitted on them."""
        features = self.features[rows]
        return features.with_columns(self.noisy((seed, fold))[rows]) if self.noisy else features

    def filter(self, is_kept: NDArray[np.bool_]) -> "TrainingTable":
        """Return the table of the rows that are kept; `is_kept` is [N]."""
        mask = pl.Series(is_kept)
        noisy = self.noisy
        return TrainingTable(
            self.features.filter(mask), (lambda key: noisy(key).filter(mask)) if noisy else None
        )
