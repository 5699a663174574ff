"""Reading the challenge's tables against the declared schema."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl

from isic import schema
from isic.headers import IMAGE_SUFFIXES
from isic.runtime.errors import UserError, first_line, warn_once
from isic.runtime.inputs import reading_input
from isic.tables import read_column, read_table

BOOLEANS = {
    form: number
    for word, number in (("true", "1"), ("false", "0"))
    for form in (word, word.title(), word.upper())
}
"""The numbers of texts that stand for booleans: polars writes `true`, pandas `True`, R `TRUE`."""

MISSING = (
    *("na", "n/a", "#na", "#n/a", "<na>", "nan", "-nan", "nat", "null", "none"),
    *("1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan"),
)
"""Texts that mean "no value", in any case, like texts without a letter or digit ("-", "?").

"Unknown" is a value: the challenge's tables contain it.
"""
# As a value they would join many patients in one group.
NO_PATIENT = ("unknown", "missing", "not available", "anonymous")
"""More such texts in `patient_id`."""
LETTER_OR_DIGIT = r"[\p{L}\p{N}]"
IMAGE_ENDING = rf"(?i)({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$"


def read_metadata(path: Path, need: Iterable[str] = ()) -> pl.DataFrame:
    """Read a metadata table, a `.csv` or `.parquet` file.

    Columns of the schema get the schema's types. Their texts are stripped, and texts that mean
    "no value" (MISSING) become null. Other columns stay as they are (text in CSV).

    Args:
        need: required columns in addition to `isic_id`.

    Raises:
        UserError: no such file, a damaged table, a required column is missing or misspelt, a value
            of the wrong type, a target other than 0 or 1, duplicate or blank ids, no rows.
    """
    require_file(path)
    with reading_input(path):
        table = read_table(path)
    return check_metadata(table, path, need)


def check_metadata(
    table: pl.DataFrame, path: Path | str = "the metadata", need: Iterable[str] = ()
) -> pl.DataFrame:
    """Return a metadata table as `read_metadata` does, with its checks.

    Args:
        table: of any types that a file of it may have.
        path: its origin, for messages.
        need: required columns in addition to `isic_id`.
    """
    _refuse_misspelt(table.columns, path)
    require(table, (schema.ID, *need), path)
    table = table.with_columns(
        _typed(table[name], path) for name in table.columns if name in schema.DTYPES
    )
    check_ids(table[schema.ID], path)
    if schema.PATIENT in table.columns:
        _warn_of_case(table[schema.PATIENT], path)
    if schema.TARGET in table.columns:
        _check_target(table, path)
        table = table.with_columns(pl.col(schema.TARGET).cast(pl.Int8))
    return table


def read_ids(path: Path) -> pl.Series:
    """Read only the ids of a table, [N] String, as `read_metadata` would.

    Raises:
        UserError: no such file, a damaged table, no `isic_id`, no rows, a blank or repeated id.
    """
    require_file(path)
    # The other columns would be most of a run's memory.
    with reading_input(path):
        ids = read_column(path, schema.ID)
    if ids is None:
        raise UserError(f"{path} lacks the column {schema.ID}; add it")
    ids = _typed(ids, path)
    check_ids(ids, path)
    return ids


def require_file(path: Path) -> None:
    """Raise a UserError if a dataset's table does not exist; other errors surface on reading."""
    try:
        path.stat()
    except FileNotFoundError:
        packed = (path.with_name(path.name + ending) for ending in (".gz", ".zst", ".xz", ".zip"))
        if found := next(filter(Path.exists, packed), None):
            raise UserError(f"no such file: {path}; decompress {found.name} first") from None
        raise UserError(
            f"no such file: {path}; point --data at a folder in the layout of the challenge"
        ) from None
    except OSError:
        return


def _refuse_misspelt(columns: Sequence[str], path: Path | str) -> None:
    """Raise a UserError for a column that matches the schema but for case or punctuation."""
    known = {_letters(name): name for name in schema.DTYPES if name not in columns}
    for name in columns:
        meant = known.get(_letters(name))
        if meant and name not in schema.DTYPES:
            raise UserError(f'{path} has a column "{name}"; rename it to {meant}')


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def require(table: pl.DataFrame, columns: Iterable[str], source: Path | str) -> None:
    """Raise a UserError that lists the required columns that `table` lacks."""
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise UserError(
            f"{source} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"add {'them' if len(missing) > 1 else 'it'}"
        )


def patient_group() -> pl.Expr:
    """Return an expression for each row's patient; a row without one is its own group."""
    return pl.coalesce(schema.PATIENT, schema.ID).alias(schema.PATIENT)


def with_patient(table: pl.DataFrame) -> pl.DataFrame:
    """Return `table` with a `patient_id` in every row: the row's id if the patient is unknown."""
    if schema.PATIENT not in table.columns:
        return table.with_columns(pl.col(schema.ID).alias(schema.PATIENT))
    return table.with_columns(patient_group())


def _typed(column: pl.Series, path: Path | str) -> pl.Series:
    if isinstance(column.dtype, pl.Categorical | pl.Enum | pl.Binary | pl.Null):
        column = _cast(column, pl.String(), path)
    if schema.DTYPES[column.name] == pl.String():
        return clean_text(column, path)
    return _number(column, path)


def clean_text(column: pl.Series, path: Path | str) -> pl.Series:
    """Return any column as stripped texts, null for those that mean "no value".

    Raises:
        UserError: the column holds lists, dates or the like; `path` is named.
    """
    name = column.name
    if column.dtype.is_float():  # pandas makes whole numbers floats as soon as one is missing
        column = column.fill_nan(None)
        whole = column.cast(pl.Int64, strict=False)
        column = whole if whole.cast(column.dtype).equals(column) else column
    text = pl.col(name).str.strip_chars()
    if name == schema.PATIENT:  # the same of a CSV that pandas wrote
        text = text.str.replace(r"^(\d+)\.0$", "${1}")
    missing = (*MISSING, *NO_PATIENT) if name == schema.PATIENT else MISSING
    clean = pl.when(~_is_missing(text, missing)).then(text).alias(name)
    values = _cast(column, pl.String(), path).to_frame()
    different = values.unique()
    # Most columns of a CSV are clean already, and their few different values are cheap to check.
    if not different.equals(different.select(clean)):
        values = values.select(clean)
    return values.to_series()


def _is_missing(text: pl.Expr, words: Sequence[str]) -> pl.Expr:
    return text.str.to_lowercase().is_in(words) | ~text.str.contains(LETTER_OR_DIGIT)


def _number(column: pl.Series, path: Path | str) -> pl.Series:
    """Return Float64, missing values as null. Raise UserError for non-numbers and infinities."""
    number = _cast(column, pl.Float64(), path, strict=False)
    wrong = (number.is_null() & column.is_not_null()) | number.is_infinite().fill_null(False)
    if wrong.any() and column.dtype == pl.String:
        column = clean_text(column, path)
        number = column.cast(pl.Float64, strict=False)
        wrong = (number.is_null() & column.is_not_null()) | number.is_infinite().fill_null(False)
    if wrong.any():
        row = wrong.to_list().index(True)
        hint = "write 1.5, not 1,5" if "," in str(column[row]) else "correct the file"
        raise UserError(
            f"{path}: column {column.name} must hold finite numbers, "
            f'row {row} has "{column[row]}"; {hint}'
        )
    return number.fill_nan(None)  # polars' null functions do not see NaN


def _cast(
    column: pl.Series, dtype: pl.DataType, path: Path | str, strict: bool = True
) -> pl.Series:
    """Cast text, numbers and booleans. Raise UserError for dates, lists and other types."""
    plain = (pl.String, pl.Boolean, pl.Categorical, pl.Enum, pl.Binary, pl.Null)
    if not (column.dtype.is_numeric() or column.dtype in plain):
        wanted = "numbers" if dtype.is_numeric() else "text"
        raise UserError(
            f"{path}: column {column.name} must hold {wanted}, not {column.dtype}; "
            f"save it as {wanted}"
        )
    try:
        return column.cast(dtype, strict=strict)
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"{path}: column {column.name} cannot be read as {dtype} "
            f"({first_line(error)}); correct the file"
        ) from None


def check_ids(ids: pl.Series, path: Path | str) -> None:
    """Raise a UserError if there are no ids, or one is blank, repeated or a file name."""
    if ids.is_empty():
        raise UserError(f"{path} has no rows; give a table with at least one")
    if ids.null_count():
        raise UserError(f"{path}: {ids.null_count()} rows have no isic_id; give every row one")
    if ids.n_unique() < len(ids):
        repeated = ids.filter(ids.is_duplicated()).unique(maintain_order=True)
        raise UserError(
            f"{path}: {len(repeated)} duplicate isic_id, the first is {repeated[0]}; "
            "keep one row per id"
        )
    is_file = ids.str.contains(IMAGE_ENDING)
    if is_file.any():
        raise UserError(
            f'{path}: isic_id "{ids.filter(is_file)[0]}" is a file name; remove the extension'
        )
    _warn_of_case(ids, path)


def _warn_of_case(names: pl.Series, path: Path | str) -> None:
    """Warn of names that differ only in case: they may be one image or one patient."""
    lower = names.str.to_lowercase()
    if lower.n_unique() == names.n_unique():
        return
    different = pl.DataFrame({"name": names, "lower": lower}).drop_nulls().unique()
    alike = different.filter(pl.col("lower").is_duplicated()).sort("lower", "name")["name"]
    warn_once(
        f"{path}: {len(alike)} {names.name} differ from another one only in case, "
        f'such as "{alike[0]}" and "{alike[1]}"; they count as different'
    )


def _check_target(table: pl.DataFrame, path: Path | str) -> None:
    wrong = table.filter(~pl.col(schema.TARGET).is_in([0.0, 1.0]).fill_null(False))
    if len(wrong):
        value = wrong[schema.TARGET][0]
        name = wrong[schema.ID][0]
        raise UserError(
            f"{path}: target must be 0 or 1 in every row, {name} has {value}; correct the file"
        )
