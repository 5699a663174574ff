"""Columns whose numbers become equal as Float32, in which boosters read them."""

import polars as pl

from isic.runtime.errors import warn

ENOUGH = 1_000
"""Different numbers that are as good as more: boosters sort a column into some 255 bins."""
KEPT = 0.9
"""Share of its different numbers that a column should keep."""
DIGITS = 12
"""Digits by which numbers differ; those after them are noise if a number was computed."""


def warn_of_rounding(column: str, values: pl.Series) -> None:
    """Warn of numbers that are different but equal as Float32, such as long codes and times.

    Args:
        column: how the message calls the column.
        values: [N] numbers of any type; those that are blank or not finite do not count.
    """
    known = values.filter(values.cast(pl.Float64).is_finite())
    after = known.cast(pl.Float32).n_unique()
    before = (known.round_sig_figs(DIGITS) if known.dtype.is_float() else known).n_unique()
    if after < KEPT * min(before, ENOUGH):
        warn(
            f"{column} has {before:,} different numbers, which are {after:,} after rounding to 32 "
            "bits; subtract a constant near them, or use another unit"
        )
