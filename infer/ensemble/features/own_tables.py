"""Tables of a user's own columns by `isic_id` (`--tables`), declared `oof` or `label_free`.

| kind | the values of a training row | column `fold` |
| --- | --- | --- |
| `oof` | by a model that was trained on the other folds only | the row's fold, in the plan |
| `label_free` | by something that never saw this table's targets | none |

The values of a row to score come from all folds' models, or from the same source.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from isic import schema
from isic.features import finite
from isic.features.rounding import warn_of_rounding
from isic.folds import Folds
from isic.metadata import BOOLEANS, MISSING, check_ids, clean_text
from isic.metrics import roc_auc
from isic.runtime.errors import UserError, first_line, warn
from isic.tables import read_table

OOF, LABEL_FREE = KINDS = ("oof", "label_free")
FOLD = "fold"
NUMBER, CATEGORY = "number", "category"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")
"""Names that every library of boosters accepts, and that are no words with another meaning."""

DECLARE = (
    "write oof:{path} if each training row's values come from models that were not trained on its "
    "fold (the column `fold` is compared with the fold plan), or label_free:{path} if nothing in "
    "it was learned from these targets"
)

# Highest AUC of a single feature of this toolkit: 0.79 on 885 real rows, 0.89 on 20,000 synthetic
# rows. Whole ensembles of raw features reach 0.93 out of fold on the former. Columns that know the
# target: `lesion_id` is 0.96 and 0.97, by its blanks alone; scores of boosters on their own
# training rows are above 0.99.
IMPLAUSIBLE_AUC = 0.95
"""AUC of a single column above which it probably knows the target."""
IMPLAUSIBLE_OOF_AUC = 0.99
"""The same of a table that was declared `oof`: scores of whole models."""
MIN_CLASS = 10
"""Rows of each class without which an AUC says little."""

MAX_CODES = 20
"""Different texts that a category may have however few rows there are."""
NEARLY_ALL = 0.9
"""Share of a column's texts that are numbers, or different, above which they are no categories."""
MOST = 0.5
"""The same of numbers, if there are more different texts than MAX_CODES."""


@dataclass(frozen=True)
class TableSpec:
    """How a table was declared, and its columns, as far as a later table must agree."""

    kind: str
    columns: Mapping[str, str]
    """NUMBER or CATEGORY by column."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "columns": dict(self.columns)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TableSpec":
        return cls(value["kind"], dict(value["columns"]))


@dataclass(frozen=True)
class OwnTable:
    """A table that was read and checked."""

    path: Path
    """The file; of a table in memory its name."""
    spec: TableSpec
    rows: pl.DataFrame
    """`isic_id`, the columns (Float32 or String) and, if `oof`, `fold` as it was read."""

    def columns(self, metadata: pl.DataFrame) -> pl.DataFrame:
        """Return `isic_id` and the columns for the rows of `metadata`, in their order.

        Raises:
            UserError: the table lacks a row.
        """
        ids = metadata.select(schema.ID)
        missing = ids.join(self.rows, on=schema.ID, how="anti", maintain_order="left")[schema.ID]
        if len(missing):
            raise UserError(
                f"{self.path} lacks {len(missing):,} of the {len(ids):,} rows, the first is "
                f"{missing[0]}; add them, with blanks if they have no values"
            )
        wanted = self.rows.select(schema.ID, *self.spec.columns)
        return ids.join(wanted, on=schema.ID, how="left", maintain_order="left")


def split_declaration(text: str) -> tuple[str | None, Path]:
    """Return the kind, None if it is not declared, and the path of an entry of `--tables`."""
    kind, colon, path = text.partition(":")
    if colon and kind in KINDS:
        return kind, Path(path).expanduser()
    return None, Path(text).expanduser()


def read_train_tables(entries: Sequence[str]) -> dict[str, OwnTable]:
    """Read the tables of a fit, by their stems.

    Raises:
        UserError: a table is not declared, is not readable, has a column that cannot be a feature,
            or an id that is blank or repeated.
    """
    found: dict[str, OwnTable] = {}
    for entry in entries:
        kind, path = split_declaration(entry)
        if kind is None:
            raise UserError(f'--tables "{entry}" does not say how: {DECLARE.format(path=path)}')
        if path.stem in found:
            raise UserError(f"two files of --tables are called {path.stem}; rename one of them")
        found[path.stem] = _read(path, kind, expected=None)
    return found


def read_test_tables(entries: Sequence[str], specs: Mapping[str, TableSpec]) -> dict[str, OwnTable]:
    """Read the tables of rows to score, by their stems, which are those of the fit.

    Raises:
        UserError: a table is missing, not of the fit, or has other columns.
    """
    declared = [split_declaration(entry) for entry in entries]
    paths = {path.stem: path for _, path in declared}
    if len(paths) < len(declared):
        raise UserError("two files of --tables have the same name; give each table once")
    for name in specs:
        if name not in paths:
            raise UserError(
                f'the ensemble was fitted with the table "{name}"; give its values of these rows '
                f"by --tables {name}.parquet"
            )
    for kind, path in declared:
        if path.stem not in specs:
            raise UserError(_unknown_table(path.stem, specs))
        if kind not in (None, specs[path.stem].kind):
            raise UserError(
                f"{path} was declared {specs[path.stem].kind} at the fit, not {kind}; leave it out"
            )
    return {name: _read(paths[name], spec.kind, spec) for name, spec in specs.items()}


def check_test_tables(
    tables: Mapping[str, pl.DataFrame], specs: Mapping[str, TableSpec]
) -> dict[str, OwnTable]:
    """Check tables of rows to score in memory by their names, as `read_test_tables` does files."""
    lacking = [name for name in specs if name not in tables]
    if lacking:
        raise UserError(
            f'the ensemble was fitted with the table "{lacking[0]}"; give its values of these rows'
        )
    for name in tables:
        if name not in specs:
            raise UserError(_unknown_table(name, specs))
    return {name: _check(tables[name], Path(name), spec.kind, spec) for name, spec in specs.items()}


def _unknown_table(name: str, specs: Iterable[str]) -> str:
    return f"no table {name} is needed to score; the tables that are: {', '.join(specs) or 'none'}"


def _read(path: Path, kind: str, expected: TableSpec | None) -> OwnTable:
    return _check(read_table(path), path, kind, expected)


def _check(table: pl.DataFrame, path: Path, kind: str, expected: TableSpec | None) -> OwnTable:
    if schema.ID not in table.columns:
        raise UserError(f"{path} lacks the column {schema.ID}; add it")
    table = table.with_columns(clean_text(table[schema.ID], path))
    check_ids(table[schema.ID], path)
    if not expected:
        table = _with_fold(table, kind, path)
    names = [name for name in table.columns if name not in (schema.ID, FOLD)]
    _refuse_columns(names, path)
    if expected:
        _refuse_other_columns(names, expected, path)
        kinds = dict(expected.columns)
    else:
        kinds = {name: _kind_of(table[name], path) for name in names}
    columns = [_typed(table[name], kinds[name], path) for name in kinds]
    fold = [table[FOLD]] if FOLD in table.columns else []
    return OwnTable(path, TableSpec(kind, kinds), table.select(schema.ID, *columns, *fold))


def _with_fold(table: pl.DataFrame, kind: str, path: Path) -> pl.DataFrame:
    """Return the table with its column `fold` under that name, in whatever case it is written."""
    found = [name for name in table.columns if name.lower() == FOLD]
    if kind == LABEL_FREE and found:
        raise UserError(
            f"{path} was declared {LABEL_FREE} but has a column {found[0]}; declare it {OOF} if "
            "models of folds made its values, else remove the column"
        )
    if len(found) > 1:
        raise UserError(f"{path} has the columns {' and '.join(found)}; remove all but one")
    return table.rename(dict.fromkeys(found, FOLD))


def _refuse_columns(names: Sequence[str], path: Path) -> None:
    if not names:
        raise UserError(f"{path} has no column but {schema.ID} and {FOLD}; add values")
    for name in names:
        if schema.is_train_only(name):
            raise UserError(
                f"{path} has a column {name}, which exists only in the training table and cannot "
                "be a feature; remove it"
            )
        if not NAME.fullmatch(name):
            raise UserError(
                f'{path} has a column "{name}"; use letters, digits, underscores and dots'
            )


def _refuse_other_columns(names: Sequence[str], expected: TableSpec, path: Path) -> None:
    lacks = [name for name in expected.columns if name not in names]
    if lacks:
        raise UserError(
            f"{path} lacks the column {lacks[0]}, which the ensemble was fitted with; add it"
        )


def _kind_of(column: pl.Series, path: Path) -> str:
    """Return whether a column holds numbers or texts, and warn of what may not be meant.

    A CSV has only texts.
    """
    if column.dtype.is_numeric():
        warn_of_rounding(f"{path}: column {column.name}", column)
        return NUMBER
    if column.dtype in (pl.Boolean, pl.Null):
        return NUMBER
    if column.dtype not in (pl.String, pl.Categorical, pl.Enum):
        raise UserError(
            f"{path}: column {column.name} holds {column.dtype}; save it as numbers or text"
        )
    text = clean_text(column, path)
    number = text.cast(pl.Float64, strict=False)
    is_number = number.is_not_null()
    if is_number.any() and (is_number | text.is_null()).all():
        warn_of_rounding(f"{path}: column {column.name}", number)
        return NUMBER
    _warn_of_blanks(column, text, path)
    if text.is_null().all():
        warn(f"{path}: column {column.name} has no values")
        return NUMBER
    _warn_of_numbers(text, is_number, path)
    return CATEGORY


def _warn_of_blanks(column: pl.Series, text: pl.Series, path: Path) -> None:
    """Warn of texts that may be answers but count as blank: they are null in `text`, [N]."""
    blank = column.cast(pl.String).str.strip_chars().filter(text.is_null()).unique().drop_nulls()
    usual = blank.str.to_lowercase().is_in(["", *{*MISSING} - {"none"}])
    answers = blank.filter(~usual).sort().to_list()
    if answers:
        warn(
            f'{path}: column {column.name} has "{answers[0]}", which counts as blank; if it is an '
            "answer, write it as another word"
        )


def _warn_of_numbers(text: pl.Series, is_number: pl.Series, path: Path) -> None:
    """Warn of a category whose texts are probably measurements, [N] null for blanks."""
    known = text.drop_nulls()
    num_texts = known.n_unique()
    subject = f"{path}: column {text.name} is used as a category, but"
    word = text.filter(~is_number).drop_nulls().mode().sort()[0]
    if is_number.sum() > (MOST if num_texts > MAX_CODES else NEARLY_ALL) * len(known):
        warn(
            f"{subject} most of its values are numbers; if it holds measurements, leave the cells "
            f'with "{word}" blank, or correct them'
        )
    elif num_texts > max(MAX_CODES, NEARLY_ALL * len(known)):
        warn(
            f"{subject} nearly all of its values are different; if it holds measurements, correct "
            f'those such as "{word}"'
        )


def _typed(column: pl.Series, kind: str, path: Path) -> pl.Series:
    """Return Float32 or String, null for blanks and for numbers that are not finite."""
    try:
        if kind == CATEGORY and (column.dtype.is_numeric() or column.dtype == pl.Boolean):
            raise UserError(
                f"{path}: column {column.name} holds {column.dtype}, at the fit it held text; "
                "save it as text"
            )
        if kind == CATEGORY or column.dtype in (pl.String, pl.Categorical, pl.Enum):
            column = clean_text(column, path)
        if kind == CATEGORY:
            return column
        if column.dtype == pl.String:
            column = column.replace(BOOLEANS)
        return column.to_frame().select(finite(column.name)).to_series()
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"{path}: column {column.name} must hold numbers ({first_line(error)}); correct it"
        ) from None


def refuse_other_folds(
    tables: Iterable[OwnTable], metadata: pl.DataFrame, fold: NDArray[np.integer], folds: Folds
) -> None:
    """Raise a UserError if an `oof` table was made with another fold plan.

    Args:
        fold: [N] of the rows of `metadata`, by `folds`.
    """
    for table in tables:
        if table.spec.kind != OOF:
            continue
        if FOLD not in table.rows.columns:
            raise UserError(
                f"{table.path} was declared oof but has no column `fold`; add each row's fold"
            )
        rows = table.rows.select(schema.ID, pl.col(FOLD).cast(pl.Float64, strict=False))
        ids = metadata.select(schema.ID)
        found = ids.join(rows, on=schema.ID, how="left", maintain_order="left")[FOLD]
        differs = found.ne_missing(pl.Series(fold).cast(pl.Float64))
        if differs.any():
            first = ids.filter(differs)[schema.ID][0]
            raise UserError(
                f"{table.path}: {int(differs.sum()):,} of the {len(ids):,} rows have another fold "
                f"than in {folds}, the first is {first}; their values may come from models that "
                "were trained on them, so make the table with this plan"
            )


def warn_of_labels(
    table: pl.DataFrame,
    target: NDArray[np.integer],
    fold: NDArray[np.integer],
    source: str,
    limit: float,
) -> None:
    """Warn of columns that separate the classes as only a copy of the target would.

    Args:
        table: [N] the columns of the training rows.
        target: [N], 0 or 1.
        fold: [N] as for `separation`.
        source: the columns' origin, for the message.
        limit: the AUC above which a column is warned of.
    """
    for column in table:
        auc = separation(column, target, fold)
        if auc > limit:
            warn(
                f"{column.name} of {source} has an AUC of {auc:.3f} on its own, which is too good "
                "to be true; it probably knows the target of the row, so the scores below cannot "
                "be trusted"
            )


def separation(column: pl.Series, target: NDArray[np.integer], fold: NDArray[np.integer]) -> float:
    """Return how well a column separates the classes: an AUC from 0.5 to 1.

    The largest one of its blanks, its values, and the share of positives that have its value in
    other folds; 0.5 if there are too few rows.

    Args:
        target: [N], 0 or 1.
        fold: [N] in which no patient is in two folds.
    """
    is_blank = column.is_null().to_numpy()
    known = column.filter(~is_blank)
    target_known = target[~is_blank]
    found = [_either(target, is_blank.astype(float))]
    if column.dtype != pl.String:
        found.append(_either(target_known, known.cast(pl.Float64).to_numpy()))
    # In one direction only: shares without the row's own fold fall if the fold has positives.
    found.append(_auc(target_known, _shares_elsewhere(known, target_known, fold[~is_blank])))
    return max(found)


def _shares_elsewhere(
    column: pl.Series, target: NDArray[np.integer], fold: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Return [N] the share of positives among the rows of other folds with the row's value.

    If there are none, the share of positives among all rows.
    """
    rows = pl.DataFrame({"value": column, "target": target, "fold": fold})
    sums = [pl.col("target").sum().over(keys) for keys in ("value", ("value", "fold"))]
    counts = [pl.len().over(keys) for keys in ("value", ("value", "fold"))]
    elsewhere = (sums[0] - sums[1]) / (counts[0].cast(pl.Int64) - counts[1])
    shares = rows.select(elsewhere.fill_nan(pl.col("target").mean()))
    return shares.to_series().to_numpy()


def _either(target: NDArray[np.integer], score: NDArray[np.float64]) -> float:
    """Return the AUC of a score, or of its negative if that is larger."""
    auc = _auc(target, score)
    return max(auc, 1 - auc)


def _auc(target: NDArray[np.integer], score: NDArray[np.float64]) -> float:
    if min(target.sum(), len(target) - target.sum()) < MIN_CLASS:
        return 0.5
    return roc_auc(target, score)
