"""Tabular features: their table, their sets, the columns they need, and their values.

Relative features compare a lesion with the same patient's lesions in the same table. No value
depends on a label, on another patient or on the row order; `encoding` learns from training rows.
"""

from collections.abc import Iterable

import numpy as np
import polars as pl

from isic import schema
from isic.features import outlier
from isic.features.encoding import Encoding, fit_encoding, unseen_categories
from isic.features.formulas import (
    CATEGORIES,
    ROW_FEATURES,
    Feature,
)
from isic.features.relative import (
    EXTENDED_FEATURES,
    PATIENT_CODE,
    RELATIVE_FEATURES,
    WITHIN,
    zscore,
)
from isic.metadata import require, with_patient
from isic.runtime.errors import UserError, did_you_mean

__all__ = [
    "FEATURES",
    "SETS",
    "Encoding",
    "Feature",
    "compute",
    "expand",
    "finite",
    "fit_encoding",
    "in_canonical_order",
    "needed_columns",
    "relative_to_patient",
    "unseen_categories",
]

_LOF = Feature(outlier.NAME, pl.col(outlier.NAME), "patient_lof", outlier.SOURCE)


SORTED_COLUMNS = 32
"""Columns that are brought into the rows' order together, to bound the memory of copies."""

FEATURES = {f.name: f for f in (*ROW_FEATURES, *RELATIVE_FEATURES, _LOF, *EXTENDED_FEATURES)}
"""Every tabular feature by name, in the column order of a feature table."""


def _sets() -> dict[str, tuple[str, ...]]:
    """Return feature names by set and by group."""
    shared = FEATURES.values()
    extended = {f.name for f in EXTENDED_FEATURES}
    sets = {
        "raw": tuple(f.name for f in shared if f.source == "raw"),
        "engineered": tuple(f.name for f in shared if f.name not in extended),
        "extended": tuple(f.name for f in shared),
    }
    for group in dict.fromkeys(f.group for f in shared):
        sets[group] = tuple(f.name for f in shared if f.group == group)
    return sets


SETS = _sets()
"""Feature names by the word that requests them: three sets, and each group."""


def expand(words: Iterable[str], also_known: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the names of the requested features, in the order of FEATURES.

    Args:
        words: sets, groups or single features.
        also_known: more suggestions for an unknown word.

    Raises:
        UserError: an unknown word, or a column that test tables lack.
    """
    wanted: set[str] = set()
    for word in words:
        if schema.is_train_only(word):
            raise UserError(
                f"{word} exists only in the training table and cannot be a feature; leave it out"
            )
        if word not in SETS and word not in FEATURES:
            raise UserError(
                f'unknown features "{word}", {did_you_mean(word, (*SETS, *FEATURES, *also_known))}'
            )
        wanted.update(SETS.get(word, (word,)))
    return tuple(name for name in FEATURES if name in wanted)


def relative_to_patient(names: Iterable[str]) -> bool:
    """Return whether a named feature depends on the patient's other lesions."""
    return any(name in FEATURES and FEATURES[name].relative for name in names)


def needed_columns(names: Iterable[str]) -> tuple[str, ...]:
    """Return the metadata columns that the named features read, in the schema's order."""
    columns: set[str] = set()
    for name in names:
        roots = _roots(name)
        if not FEATURES[name].relative:
            columns.update(roots)
            continue
        columns.add(schema.PATIENT)
        for root in roots:
            if root in FEATURES:  # not PATIENT_CODE
                columns.update(_roots(root))
    assert not columns & set(schema.TRAIN_ONLY)
    return tuple(name for name in schema.DTYPES if name in columns)


def _roots(name: str) -> Iterable[str]:
    if name == outlier.NAME:
        return outlier.OUTLIER_COLUMNS
    return FEATURES[name].expr.meta.root_names()


def compute(metadata: pl.DataFrame, names: Iterable[str]) -> pl.DataFrame:
    """Compute features from the result of `read_metadata`; `names` are those of `expand`.

    Returns:
        `isic_id` and one column per name, rows in the order of `metadata`. Categories are String;
        numbers are Float32, never NaN, null if blank or beyond float32.

    Raises:
        UserError: a needed column is missing.
    """
    names = tuple(names)
    columns = needed_columns(names)
    require(metadata, columns, "the metadata")
    rows = in_canonical_order(metadata, columns).with_columns(
        f.expr.alias(f.name) for f in _needed_formulas(names)
    )
    present = [name for name in names if name in rows.columns]
    relative = [f for f in FEATURES.values() if f.relative and f.name in names and f is not _LOF]
    # 200 columns set the peak of memory: cast to Float32 at once and free tables that are done.
    table = rows.select(
        "_row", schema.ID, *present, *(f.expr.cast(pl.Float32).alias(f.name) for f in relative)
    )
    if outlier.NAME in names:
        table = table.with_columns(_lof(rows))
    del rows
    order = table["_row"].arg_sort()
    parts = [table.select(schema.ID)[order]]
    for start in range(0, len(names), SORTED_COLUMNS):
        part = names[start : start + SORTED_COLUMNS]
        parts.append(table.select(_typed(name) for name in part)[order])
        table = table.drop(part)
    return pl.concat(parts, how="horizontal")


def in_canonical_order(metadata: pl.DataFrame, columns: Iterable[str]) -> pl.DataFrame:
    """Return `_row`, `isic_id`, PATIENT_CODE and the columns, sorted by patient and id."""
    # Sorted, so that floating-point sums do not depend on the file's order.
    patient = with_patient(metadata)[schema.PATIENT].alias(PATIENT_CODE)
    keyed = (
        metadata.select(schema.ID, patient, *columns)
        .with_row_index("_row")
        .sort(PATIENT_CODE, schema.ID)
    )
    return keyed.with_columns(pl.col(PATIENT_CODE).rle_id().set_sorted()).rechunk()


def _needed_formulas(names: tuple[str, ...]) -> list[Feature]:
    """Return the row formulas to compute: the named ones and those that relative ones read."""
    needed = set(names)
    for name in names:
        needed.update(FEATURES[name].expr.meta.root_names())
    return [
        f for f in FEATURES.values() if f.name in needed and not f.relative and f.source != "raw"
    ]


def _lof(table: pl.DataFrame) -> pl.Series:
    scores = (
        zscore(pl.col(name), WITHIN["patient"]).cast(pl.Float32).alias(name)
        for name in outlier.OUTLIER_COLUMNS
    )
    measured = table.select(scores).to_numpy(order="c").astype(np.float32)
    factor = outlier.patient_lof(measured, table[PATIENT_CODE].to_numpy())
    return pl.Series(outlier.NAME, factor)


def _typed(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.String) if name in CATEGORIES else finite(name)


def finite(name: str) -> pl.Expr:
    """Return a column of numbers as Float32, null if it is NaN or beyond float32."""
    # A value beyond float32 becomes infinite, and then null.
    number = pl.col(name).cast(pl.Float32)
    return pl.when(number.is_finite()).then(number).alias(name)
