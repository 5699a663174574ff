"""The challenge's training table, made of a collection's tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import polars as pl

from isic import schema
from isic.importers.collections import DIAMETERS, Collection, Diagnosis, Table
from isic.metadata import MISSING, check_ids, require
from isic.runtime.errors import UserError
from isic.tables import first_bytes, read_table, read_tsv

NO_VALUE = (*MISSING, "", "unknown")
CODE = "_code"
"""Column of the diagnosis in the collection's own words."""
FIELDS = (
    *(schema.ID, schema.TARGET, schema.PATIENT, "age_approx", "sex", "anatom_site_general"),
    *("clin_size_long_diam_mm", "image_type", "attribution", "copyright_license"),
    *("lesion_id", "iddx_full", "iddx_1"),
)
"""Columns of the new table, as far as the collection has them."""


class Imported(NamedTuple):
    """A collection's rows in the challenge's words."""

    table: pl.DataFrame
    notes: list[str]
    """Sentences on rows and columns that were not imported."""


def build_table(collection: Collection, paths: Mapping[Table, Path]) -> Imported:
    """Return the training table, sorted by id.

    Raises:
        UserError: a column is missing, or a value is none of the published ones.
    """
    rows, notes = _join(paths)
    rows = rows.with_columns(_code(collection, rows, next(iter(paths.values()))))
    _refuse_unknown_codes(collection, rows)
    table = rows.select(
        schema.ID,
        *_diagnosis_columns(collection),
        *_renamed(collection, rows),
        *_attribution(collection, rows),
        pl.lit(collection.image_type).alias("image_type"),
        pl.lit(collection.licence).alias("copyright_license"),
    )
    if table[schema.TARGET].null_count():
        name = table.filter(pl.col(schema.TARGET).is_null())[schema.ID][0]
        raise UserError(f"{name} has no {collection.target}; correct the collection's table")
    table, odd = _with_sites(collection, table)
    if odd:
        notes.append(f"sites without an equivalent are blank: {', '.join(odd)}")
    if set(DIAMETERS) <= set(rows.columns):
        sizes = [_number(rows, name) for name in DIAMETERS]
        size = pl.max_horizontal(sizes).alias("clin_size_long_diam_mm")
        table = table.with_columns(rows.select(size))
    if collection.group in table.columns:
        table = table.with_columns(pl.col(collection.group).alias(schema.PATIENT))
    columns = [name for name in FIELDS if name in table.columns]
    return Imported(table.select(columns).sort(schema.ID), notes)


def _join(paths: Mapping[Table, Path]) -> tuple[pl.DataFrame, list[str]]:
    """Return the rows of the first table with the columns of the others, and notes."""
    joined: pl.DataFrame | None = None
    notes = []
    for table, path in paths.items():
        rows = _read(path)
        require(rows, (table.key, *table.columns), path)
        known = (table.key, *table.columns, *table.optional_columns)
        extra = [name for name in rows.columns if name not in known]
        if extra:
            notes.append(f"columns of {path.name} that are not imported: {', '.join(extra)}")
        # PAD-UFES-20 names files, the others images.
        name = pl.col(table.key).str.replace(r"(?i)\.(png|jpe?g)$", "").alias(schema.ID)
        rows = rows.select(name, *(column for column in known[1:] if column in rows.columns))
        check_ids(rows[schema.ID], path)
        if joined is None:
            joined = rows
            continue
        lacking = joined.join(rows, on=schema.ID, how="anti")
        if len(lacking):
            raise UserError(
                f"{path} lacks {len(lacking):,} images, the first is {lacking[schema.ID][0]}; "
                "download it again"
            )
        joined = joined.join(rows, on=schema.ID, how="left", maintain_order="left")
    assert joined is not None
    return joined, notes


def _read(path: Path) -> pl.DataFrame:
    """Read a table of text columns, separated by commas or, as Dataverse has them, tabs."""
    if b"\t" in first_bytes(path, 1024).partition(b"\n")[0]:
        return read_tsv(path)
    return read_table(path)


def _code(collection: Collection, rows: pl.DataFrame, path: Path) -> pl.Series:
    """Return [N] each row's diagnosis in the collection's words."""
    if isinstance(collection.diagnosis, str):
        return rows[collection.diagnosis].str.strip_chars().alias(CODE)
    flags = rows.select(
        (pl.col(name).cast(pl.Float64, strict=False) == 1).fill_null(False)
        for name in (*collection.diagnosis, *({"UNK"} & set(rows.columns)))
    )
    wrong = flags.select(pl.sum_horizontal(pl.all()) != 1).to_series()
    if wrong.any():
        raise UserError(
            f"{path}: {int(wrong.sum()):,} rows do not have exactly one diagnosis, the first is "
            f"{rows.filter(wrong)[schema.ID][0]}; download it again"
        )
    chosen = flags.select(
        pl.coalesce(pl.when(name).then(pl.lit(name)) for name in flags.columns).alias(CODE)
    )
    return chosen.to_series()


def _refuse_unknown_codes(collection: Collection, rows: pl.DataFrame) -> None:
    codes = rows[CODE].fill_null("").unique().sort()
    unknown = [code for code in codes if code not in collection.diagnoses]
    if unknown:
        raise UserError(
            f'{collection.title} has no diagnosis "{unknown[0]}", only '
            f"{', '.join(collection.diagnoses)}; correct its table"
        )


def _diagnosis_columns(collection: Collection) -> list[pl.Expr]:
    """Return target, `iddx_1` and `iddx_full`."""

    def values(text: Mapping[str, str | int], kind: type[pl.DataType]) -> pl.Expr:
        return pl.col(CODE).replace_strict(text, return_dtype=kind)

    found = collection.diagnoses
    malignant = {code: int(diagnosis.kind == "Malignant") for code, diagnosis in found.items()}
    target = values(malignant, pl.Int8)
    if collection.target:
        target = pl.col(collection.target).cast(pl.Float64, strict=False).cast(pl.Int8)
    return [
        target.alias(schema.TARGET),
        values({code: full_name(diagnosis) for code, diagnosis in found.items()}, pl.String).alias(
            "iddx_full"
        ),
        values({code: diagnosis.kind for code, diagnosis in found.items()}, pl.String).alias(
            "iddx_1"
        ),
    ]


def full_name(diagnosis: Diagnosis) -> str:
    """Return the diagnosis as `iddx_full` of the challenge has it."""
    return f"{diagnosis.kind}::{diagnosis.name}"


def _renamed(collection: Collection, rows: pl.DataFrame) -> list[pl.Expr | pl.Series]:
    """Return the columns that only have another name, blanks and "unknown" as null."""
    found: list[pl.Expr | pl.Series] = []
    for name, source in collection.columns.items():
        if source not in rows.columns:
            continue
        if name in schema.NUMERIC:
            found.append(_number(rows, source).alias(name))
            continue
        text = pl.col(source).str.strip_chars()
        text = pl.when(~text.str.to_lowercase().is_in(NO_VALUE)).then(text)
        found.append((text.str.to_lowercase() if name == "sex" else text).alias(name))
    return found


def _number(rows: pl.DataFrame, name: str) -> pl.Series:
    """Return Float64. Raise UserError for text that is neither a number nor blank."""
    text = rows[name].str.strip_chars()
    number = text.cast(pl.Float64, strict=False).fill_nan(None)
    lower = text.str.to_lowercase().fill_null("")
    wrong = number.is_null() & ~lower.is_in(NO_VALUE)
    if wrong.any():
        raise UserError(
            f'the column {name} holds "{text.filter(wrong)[0]}", which is not a number; correct '
            "the collection's table"
        )
    return number


def _attribution(collection: Collection, rows: pl.DataFrame) -> list[pl.Expr]:
    """Return the attribution, by the start of the column that decides it."""
    value = pl.lit(collection.attribution)
    column = collection.attribution_column
    if column in rows.columns:
        for start, attribution in collection.attribution_by.items():
            holds = pl.col(column).str.starts_with(start).fill_null(False)
            value = pl.when(holds).then(pl.lit(attribution)).otherwise(value)
    return [value.alias("attribution")]


def _with_sites(collection: Collection, table: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Return the table with the challenge's sites, and the words that have no equivalent."""
    name = "anatom_site_general"
    if name not in table.columns:
        return table, []
    words = table[name].str.to_lowercase()
    odd = sorted(set(words.drop_nulls()) - set(collection.sites))
    sites = words.replace_strict(dict(collection.sites), default=None, return_dtype=pl.String)
    return table.with_columns(sites.alias(name)), odd
