"""Differences of a table to score from the training table, and whether chance explains them.

The ensemble keeps shares of the training rows: of numbers up to some edges, of categories, and of
blanks. Shares of another table are compared with them in standard errors. Lesions of a patient are
alike, so a share's error depends on patients: with intraclass correlation rho and n_i lesions of
patient i, the variance of a share p is p (1 - p) (rho * sum n_i^2 + (1 - rho) * sum n_i) /
(sum n_i)^2 (Donner and Klar 2000, "Design and Analysis of Cluster Randomization Trials").
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.ensemble.blends.ranks import Scores
from infer.ensemble.two_sample import UNLIKELY, TwoSample
from isic import schema
from isic.metadata import with_patient
from isic.runtime.errors import first_of

SCORE = "score"
ALL_COLUMNS = "all columns together"
NUM_BINS = 20
"""Bins of equal numbers of training rows, for numbers."""
SMALLEST_VARIANCE = 0.02
"""Least p (1 - p) of a share: rarer ones are not normally distributed among few patients."""
SMALLEST_SHARE = 1e-4
"""Least share in the population stability index, which has the logarithm of shares."""
MAX_CATEGORIES = 100
"""Different texts of an own column up to which it is summarised."""
# The mean of several models varies less than one model's values. If these are normally distributed
# and independent, shares differ by up to 0.18 with 5 folds and 0.25 with 10. The mean over 5 folds
# of boosters on 3,000 synthetic rows (correlation 0.8) had a line in 5 of 15 draws by its spread.
EXPLAINED_BY_MEANS = 0.3
"""Difference of a share up to which one fold's values may differ from means over folds."""
MAX_NAMED = 5

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shares:
    """Shares of some rows that have each of K properties."""

    share: Floats
    """[K]."""
    rho: Floats
    """[K] correlation between lesions of a patient, in [0, 1]."""
    rows: int
    squares: int
    """Sum over patients of the squared number of rows."""

    @classmethod
    def of(cls, properties: Bools, patient: NDArray[np.integer]) -> "Shares":
        """Return the shares of rows [K, N] by the patient [N] of each row."""
        _, code, sizes = np.unique(patient, return_inverse=True, return_counts=True)
        rows, squares = len(code), int((sizes.astype(np.int64) ** 2).sum())
        share = properties.mean(axis=1) if rows else np.zeros(len(properties))
        counts = np.array([np.bincount(code, has, len(sizes)) for has in properties])
        excess = ((counts.reshape(len(properties), -1) - share[:, None] * sizes) ** 2).sum(axis=1)
        spread = share * (1 - share)
        # Patients of one lesion each show no correlation: the highest is assumed.
        rho = np.ones(len(share))
        known = (spread > 0) & (squares > rows)
        rho[known] = (excess[known] / spread[known] - rows) / (squares - rows)
        return cls(share, rho.clip(0, 1), rows, squares)

    def like(self, share: float) -> "Shares":
        """Return the share of one other property of the same rows, alike within patients."""
        return replace(self, share=np.array([share]), rho=np.ones(1))

    def distance(self, other: "Shares") -> float:
        """Return the largest difference from other rows, in standard errors; 0 without rows.

        The correlations are those of `self`, which has more patients.
        """
        if not (self.rows and other.rows and len(self.share)):
            return 0.0
        pooled = (self.share * self.rows + other.share * other.rows) / (self.rows + other.rows)
        spread = np.maximum(pooled * (1 - pooled), SMALLEST_VARIANCE)
        terms = [
            (self.rho * each.squares + (1 - self.rho) * each.rows) / each.rows**2
            for each in (self, other)
        ]
        return float(np.max(np.abs(self.share - other.share) / np.sqrt(spread * sum(terms))))

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "share": self.share.tolist(), "rho": self.rho.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Shares":
        share, rho = np.array(value["share"], float), np.array(value["rho"], float)
        return cls(share, rho, value["rows"], value["squares"])


@dataclass(frozen=True)
class ColumnSummary:
    """A column of the training table."""

    points: tuple[float, ...] | tuple[str, ...]
    """Edges of a number, rising, or the values of a category."""
    shares: Shares
    """Of the rows that are not blank: of each category, or of values up to each edge."""
    blank: Shares
    limits: tuple[float, float] | None = None
    """Lowest and highest value of a number."""
    is_averaged: bool = False
    """Whether the value of a training row is by one fold's model, of others the mean over folds."""

    @property
    def is_number(self) -> bool:
        return not any(isinstance(point, str) for point in self.points)

    @property
    def middle(self) -> float | str:
        """The median, for an even number the lower one, or the commonest value of a category."""
        share = self.shares.share
        # Not the middle edge: a value that many rows have is one edge only.
        return self.points[int(np.searchsorted(share, 0.5) if self.is_number else share.argmax())]

    def share_below(self, value: float) -> float:
        """Return the share of the training rows' numbers up to a value, up to its bin."""
        below = np.searchsorted(np.asarray(self.points, np.float64), value, side="right")
        return float(self.shares.share[below - 1]) if below else 0.0

    def to_json(self) -> dict[str, Any]:
        parts = {"shares": self.shares.to_json(), "blank": self.blank.to_json()}
        points, limits = list(self.points), self.limits
        return {"points": points, "limits": limits, "is_averaged": self.is_averaged, **parts}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ColumnSummary":
        shares, blank = (Shares.from_json(value[key]) for key in ("shares", "blank"))
        limits = tuple(value["limits"]) if value["limits"] else None
        # Earlier versions summarised raw columns only.
        return cls(tuple(value["points"]), shares, blank, limits, value.get("is_averaged", False))


Summary = Mapping[str, ColumnSummary]
"""By column."""


def summarise_table(metadata: pl.DataFrame, names: Sequence[str]) -> dict[str, ColumnSummary]:
    """Summarise the columns of a training table that are raw numbers or categories.

    Columns that are blank in every row are left out.
    """
    raw = [name for name in names if name in (*schema.NUMERIC, *schema.CATEGORICAL)]
    return _summarise(metadata.select(raw), _patient(metadata))


def summarise_own(
    columns: pl.DataFrame, metadata: pl.DataFrame, averaged: Collection[str]
) -> dict[str, ColumnSummary]:
    """Summarise own columns, numbers or texts, of the rows of a training table.

    Columns that are blank in every row, or have more than MAX_CATEGORIES texts, are left out.

    Args:
        averaged: the columns of which a row to score has the mean over folds.
    """
    texts = columns.select(pl.col(pl.String))
    too_many = [column.name for column in texts if column.n_unique() > MAX_CATEGORIES]
    found = _summarise(columns.drop(too_many), _patient(metadata))
    return {name: replace(column, is_averaged=name in averaged) for name, column in found.items()}


def _summarise(columns: pl.DataFrame, patient: NDArray[np.integer]) -> dict[str, ColumnSummary]:
    found = {}
    for column in columns:
        points = _points(column.drop_nulls())
        if points:
            shares = _shares(column, points, patient)
            found[column.name] = ColumnSummary(points, *shares, _limits(column))
    return found


def _limits(column: pl.Series) -> tuple[float, float] | None:
    if not column.dtype.is_numeric():
        return None
    known = column.drop_nulls().to_numpy()
    return float(known.min()), float(known.max())


def _points(known: pl.Series) -> tuple[float, ...] | tuple[str, ...]:
    if not known.dtype.is_numeric():
        return tuple(known.unique().sort())
    if known.is_empty():
        return ()
    inner = np.arange(1, NUM_BINS) / NUM_BINS
    return tuple(np.unique(np.quantile(known, inner, method="inverted_cdf")).tolist())


def _shares(
    column: pl.Series, points: Sequence[Any], patient: NDArray[np.integer]
) -> tuple[Shares, Shares]:
    """Return the shares at the points among rows that are not blank, and that of blanks."""
    is_blank = column.is_null().to_numpy()
    known = column.drop_nulls().to_numpy()
    has = (known <= point if column.dtype.is_numeric() else known == point for point in points)
    properties = np.array(list(has), bool).reshape(len(points), -1)
    return Shares.of(properties, patient[~is_blank]), Shares.of(is_blank[None], patient)


def _patient(metadata: pl.DataFrame) -> NDArray[np.integer]:
    return with_patient(metadata)[schema.PATIENT].rank("dense").to_numpy()


def measure_drift(
    summary: Summary,
    table: pl.DataFrame,
    trained: Scores,
    score: Scores,
    together: TwoSample | None = None,
) -> pl.DataFrame:
    """Compare a table and its scores with those of training.

    Args:
        table: [N] the rows to score: their metadata and own columns.
        trained: [M] out-of-fold scores of the training rows.
        score: [N].
        together: how well a classifier tells both tables apart, if there is one.

    Returns:
        `column`; `ks`, the Kolmogorov-Smirnov statistic of a number (at 19 quantiles of training);
        `psi`, the population stability index over 20 bins or the categories; `unseen`, the share of
        rows with a category that no training row has; `blank_trained` and `blank`, the shares of
        blanks; `errors`, the largest difference of a share in standard errors; `differs`, whether
        it is above UNLIKELY. The row ALL_COLUMNS has the `auc` of `together`. The last row is of
        the scores, which has none of these three: out-of-fold scores are by one fold's models and
        others by all, so they differ anyway.
    """
    patient = _patient(table)
    rows = [
        {"column": name} | _compare(column, table[name], patient)
        for name, column in summary.items()
        if name in table.columns
    ]
    if together:
        about = {"auc": together.auc, "errors": together.errors, "differs": together.differs}
        rows.append({"column": ALL_COLUMNS, **about})
    edges = _points(pl.Series(trained))
    own = [_shares(pl.Series(each), edges, np.arange(len(each)))[0] for each in (trained, score)]
    scores = {"column": SCORE, "ks": _ks(*own), "psi": _psi(_bins(own[0]), _bins(own[1]))}
    return pl.DataFrame([*rows, scores], schema=DRIFT_SCHEMA, orient="row")


DRIFT_SCHEMA = {
    "column": pl.String,
    "auc": pl.Float64,
    "ks": pl.Float64,
    "psi": pl.Float64,
    "unseen": pl.Float64,
    "blank_trained": pl.Float64,
    "blank": pl.Float64,
    "errors": pl.Float64,
    "differs": pl.Boolean,
}


def _compare(
    trained: ColumnSummary, column: pl.Series, patient: NDArray[np.integer]
) -> dict[str, float | bool | None]:
    shares, blank = _shares(column, trained.points, patient)
    errors = max(_distance(trained, shares), trained.blank.distance(blank))
    unseen = None
    if not trained.is_number and shares.rows:
        unseen = max(1 - float(shares.share.sum()), 0.0)
        errors = max(errors, trained.shares.like(0.0).distance(shares.like(unseen)))
    split = _bins if trained.is_number else _categories
    return {
        "ks": _ks(trained.shares, shares) if trained.is_number and shares.rows else None,
        "psi": _psi(split(trained.shares), split(shares)) if shares.rows else None,
        "unseen": unseen,
        "blank_trained": float(trained.blank.share[0]),
        "blank": float(blank.share[0]),
        "errors": errors,
        "differs": errors > UNLIKELY,
    }


def _distance(trained: ColumnSummary, shares: Shares) -> float:
    if trained.is_averaged and _ks(trained.shares, shares) <= EXPLAINED_BY_MEANS:
        return 0.0
    return trained.shares.distance(shares)


def _ks(first: Shares, second: Shares) -> float:
    return float(np.max(np.abs(first.share - second.share)))


def _bins(shares: Shares) -> Floats:
    """Return the shares between the edges of a number."""
    return np.diff(shares.share, prepend=0, append=1)


def _categories(shares: Shares) -> Floats:
    """Return the shares of the categories and of all others."""
    return np.append(shares.share, 1 - shares.share.sum())


def _psi(first: Floats, second: Floats) -> float:
    low, high = (np.maximum(share, SMALLEST_SHARE) for share in (first, second))
    return float(np.sum((high - low) * np.log(high / low)))


def drift_warning(drift: pl.DataFrame) -> str | None:
    """Return a sentence on the columns that differ; None if there are none."""
    found = drift.filter("differs").sort("errors", descending=True)["column"].to_list()
    if not found:
        return None
    return (
        f"the rows differ from those of training by more than chance explains in "
        f"{first_of(found, MAX_NAMED)}, so their scores may be worse than out of fold"
    )


def summary_to_json(summary: Summary) -> dict[str, Any]:
    return {name: column.to_json() for name, column in summary.items()}


def summary_from_json(value: Mapping[str, Any]) -> dict[str, ColumnSummary]:
    return {name: ColumnSummary.from_json(column) for name, column in value.items()}
