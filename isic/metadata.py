"""Reading the challenge's tables against the declared schema."""

from collections.abc import Iterable
from pathlib import Path

import polars as pl

from isic import schema
from isic.errors import UserError

NULLS = ["", "NA"]
LONGEST_ROW = 65_536
"""Bytes at the end of a CSV in which its last row is looked for."""


def read_metadata(path: Path, need: Iterable[str] = ()) -> pl.DataFrame:
    """Reads a metadata table from CSV or Parquet.

    Every column is read as text first, so a column's type never depends on its first rows. Blanks and `NA` are
    null, the schema's columns get its types, an unknown column is kept as it is (text in CSV).

    Args:
        path: a `.csv` or `.parquet` file.
        need: columns that must be there beside `isic_id`.

    Raises:
        UserError: no such file, not a table, a needed column is missing, a value has the wrong type, a target
            other than 0 or 1, duplicate or blank ids, no rows.
    """
    if not path.is_file():
        raise UserError(
            f"no such file: {path}; point --data at a folder in the layout of the challenge"
        )
    try:
        if path.suffix == ".parquet":
            table = pl.read_parquet(path)
        else:
            table = pl.read_csv(path, infer_schema=False, null_values=NULLS)
            _refuse_cut(path, table.width)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        first_line = (str(error).splitlines() or ["no content"])[0]
        raise UserError(f"{path} is not a readable table: {first_line}") from None
    require(table, (schema.ID, *need), path)
    table = table.with_columns(
        _typed(table, name, path) for name in table.columns if name in schema.DTYPES
    )
    _check_ids(table, path)
    if schema.TARGET in table.columns:
        _check_target(table, path)
        table = table.with_columns(pl.col(schema.TARGET).cast(pl.Int8))
    return table


def _refuse_cut(path: Path, num_columns: int) -> None:
    """Raises a UserError where the last row is short: half a file would be taken for a whole one, with blanks."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST_ROW))
        last = file.read().rstrip().rsplit(b"\n", 1)[-1]
    num_fields = last.count(b",") + 1
    if num_fields < num_columns and b'"' not in last:
        raise UserError(
            f"{path}: the last row has {num_fields} of {num_columns} fields; it is cut short, copy or download it again"
        )


def require(table: pl.DataFrame, columns: Iterable[str], source: Path | str) -> None:
    """Raises a UserError that names the columns which `table` lacks."""
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise UserError(
            f"{source} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; add what is missing"
        )


def patient_group() -> pl.Expr:
    """The patient of each row; a row without one is its own group."""
    return pl.coalesce(schema.PATIENT, schema.ID).alias(schema.PATIENT)


def with_patient(table: pl.DataFrame) -> pl.DataFrame:
    """Returns `table` with a `patient_id` in every row: the row's own id where the patient is not known."""
    if schema.PATIENT not in table.columns:
        return table.with_columns(pl.col(schema.ID).alias(schema.PATIENT))
    return table.with_columns(patient_group())


def _typed(table: pl.DataFrame, name: str, path: Path) -> pl.Series:
    column, wanted = table[name], schema.DTYPES[name]
    if (
        column.dtype == pl.String
    ):  # of a Parquet file: what is a blank in the one format is one in the other
        column = table.select(pl.when(~pl.col(name).is_in(NULLS)).then(pl.col(name))).to_series()
    if wanted == pl.String():
        return column.cast(pl.String)
    number = column.cast(pl.Float64, strict=False)
    wrong = (number.is_null() & column.is_not_null()) | number.is_infinite().fill_null(False)
    if wrong.any():
        row = wrong.to_list().index(True)
        raise UserError(
            f'{path}: column {name} must hold finite numbers, row {row} has "{column[row]}"; mend the file'
        )
    return number.fill_nan(None)  # polars' null functions do not see NaN


def _check_ids(table: pl.DataFrame, path: Path) -> None:
    ids = table[schema.ID]
    if ids.is_empty():
        raise UserError(f"{path} has no rows; give a table with at least one")
    if ids.null_count():
        raise UserError(f"{path}: {ids.null_count()} rows have no isic_id; give every row one")
    repeated = ids.filter(ids.is_duplicated()).unique(maintain_order=True)
    if len(repeated):
        raise UserError(
            f"{path}: {len(repeated)} isic_id stand more than once, the first is {repeated[0]}; keep one row each"
        )


def _check_target(table: pl.DataFrame, path: Path) -> None:
    wrong = table.filter(~pl.col(schema.TARGET).is_in([0.0, 1.0]).fill_null(False))
    if len(wrong):
        value, name = wrong[schema.TARGET][0], wrong[schema.ID][0]
        raise UserError(
            f"{path}: target must be 0 or 1 in every row, {name} has {value}; mend the file"
        )
