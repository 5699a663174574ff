"""Array types that several modules name, and columns as arrays."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.integer]
"""0 or 1."""


def codes(column: pl.Series) -> NDArray[np.int64]:
    """Return [N] the number of each row's value, 0 for the lowest one, in the order of values."""
    return (column.rank("dense") - 1).cast(pl.Int64).to_numpy()
