"""Feature encoding learned from training rows: category codes and medians, as plain data."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

BLANK = -1.0
"""Code of a blank category and of a category that the training rows lack."""


@dataclass(frozen=True)
class Encoding:
    """Turns a feature table into the boosters' matrix.

    A category becomes its rank by falling frequency in the training rows (0 is the most frequent);
    a blank and an unseen category become BLANK. A blank number becomes the median of the training
    rows, or 0 if they have none.
    """

    names: tuple[str, ...]
    """Columns of the matrix, in order."""
    medians: Mapping[str, float]
    categories: Mapping[str, tuple[str, ...]]

    def transform(self, features: pl.DataFrame) -> NDArray[np.float32]:
        """Return [N, D] float32, C-ordered and finite."""
        matrix = features.select(self._column(name) for name in self.names).to_numpy(order="c")
        assert matrix.dtype == np.float32
        return np.ascontiguousarray(matrix)

    def _column(self, name: str) -> pl.Expr:
        if name not in self.categories:
            return pl.col(name).fill_null(self.medians[name]).cast(pl.Float32)
        known = self.categories[name]
        codes = pl.Series(range(len(known)), dtype=pl.Float32)
        values = pl.Series(known, dtype=pl.String)
        code = pl.col(name).replace_strict(values, codes, default=BLANK, return_dtype=pl.Float32)
        return code.fill_null(BLANK).cast(pl.Float32).alias(name)

    def blank_categories(
        self,
        matrix: NDArray[np.float32],
        share: float,
        random: np.random.Generator,
        names: Collection[str] = (),
    ) -> None:
        """Set category columns to BLANK, each in its own random share of the rows, in place.

        Args:
            matrix: [N, D] float32 from `transform`.
            share: fraction of the rows, in [0, 1).
            names: the columns, all categories if there are none.
        """
        # Trees separate BLANK from 0 only if training rows contain it. Otherwise they would score
        # an unseen category like the most frequent one.
        for name in self.categories:
            if names and name not in names:
                continue
            blanked = random.random(len(matrix)) < share
            matrix[blanked, self.names.index(name)] = BLANK

    def to_json(self) -> dict[str, Any]:
        return {
            "medians": dict(self.medians),
            "categories": {name: list(v) for name, v in self.categories.items()},
        }

    @classmethod
    def from_json(cls, names: tuple[str, ...], value: Mapping[str, Any]) -> "Encoding":
        return cls(
            names,
            dict(value["medians"]),
            {name: tuple(v) for name, v in value["categories"].items()},
        )


def fit_encoding(features: pl.DataFrame, names: tuple[str, ...]) -> Encoding:
    """Learn the encoding of the named columns from a feature table of training rows."""
    is_text = {name: features.schema[name] == pl.String for name in names}
    numeric = [name for name in names if not is_text[name]]
    medians: dict[str, float] = {}
    if numeric:
        table = features.select(pl.col(numeric).median().fill_null(0).cast(pl.Float64))
        medians = table.row(0, named=True)
    categories = {name: _by_frequency(features[name]) for name in names if is_text[name]}
    return Encoding(names, medians, categories)


def _by_frequency(column: pl.Series) -> tuple[str, ...]:
    # Ties by name, so that codes do not depend on the order of the rows.
    counts = (
        column.drop_nulls().value_counts().sort(["count", column.name], descending=[True, False])
    )
    return tuple(counts[column.name])


def unseen_categories(
    features: pl.DataFrame, encodings: Collection[Encoding]
) -> dict[str, dict[str, int]]:
    """Return the number of rows by column and value of categories that no encoding knows."""
    known_values: dict[str, set[str]] = {}
    for encoding in encodings:
        for name, values in encoding.categories.items():
            known_values.setdefault(name, set()).update(values)
    found = {}
    for name, known in known_values.items():
        column = features[name].drop_nulls()
        counts = column.filter(~column.is_in(list(known))).value_counts().sort(name)
        if len(counts):
            found[name] = dict(counts.iter_rows())
    return found
