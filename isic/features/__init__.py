"""Tabular features: which there are, what they need, and their values for a table.

A feature is a row of a table (`formulas`, `relative`): its name, its expression and where it comes from. What is
relative is relative to the same patient's lesions in the same table, so no feature of a row depends on a label, on
another patient or on the order of rows. What must be learnt from training rows is in `encoding`.
"""

from collections.abc import Iterable

import numpy as np
import polars as pl

from isic import schema
from isic.errors import UserError, did_you_mean
from isic.features import outlier
from isic.features.encoding import Encoding, fit_encoding, unseen_categories
from isic.features.formulas import CATEGORIES, ROW_FEATURES, Feature
from isic.features.relative import (
    EXTENDED_FEATURES,
    PATIENT_CODE,
    RELATIVE_FEATURES,
    WITHIN,
    zscore,
)
from isic.metadata import require, with_patient

__all__ = [
    "FEATURES",
    "SETS",
    "Encoding",
    "Feature",
    "compute",
    "expand",
    "fit_encoding",
    "needed_columns",
    "relative_to_patient",
    "unseen_categories",
]

_LOF = Feature(outlier.NAME, pl.col(outlier.NAME), "patient_lof", outlier.SOURCE)
_RELATIVE = (*RELATIVE_FEATURES, *EXTENDED_FEATURES)

FEATURES: dict[str, Feature] = {
    f.name: f for f in (*ROW_FEATURES, *RELATIVE_FEATURES, _LOF, *EXTENDED_FEATURES)
}
"""Every tabular feature by name, in the order in which a feature table has them."""

_EXTENDED_NAMES = {f.name for f in EXTENDED_FEATURES}

SETS: dict[str, tuple[str, ...]] = {
    "raw": tuple(f.name for f in FEATURES.values() if f.source == "raw"),
    "engineered": tuple(name for name in FEATURES if name not in _EXTENDED_NAMES),
    "extended": tuple(FEATURES),
    **{
        group: tuple(f.name for f in FEATURES.values() if f.group == group)
        for group in {f.group: 0 for f in FEATURES.values()}
    },
}
"""What can be asked for by one word: the three sets, and each group."""


def expand(words: Iterable[str], also_known: Iterable[str] = ()) -> tuple[str, ...]:
    """Returns the features that the words name (a set, a group or a single feature), in the table's order.

    Raises:
        UserError: a word that names nothing, or a column that test tables lack.
    """
    wanted: set[str] = set()
    for word in words:
        if word in schema.TRAIN_ONLY:
            raise UserError(
                f"{word} stands in training tables only, so it cannot be a feature; leave it out"
            )
        if word not in SETS and word not in FEATURES:
            raise UserError(
                f'unknown features "{word}", {did_you_mean(word, (*SETS, *FEATURES, *also_known))}'
            )
        wanted.update(SETS.get(word, (word,)))
    return tuple(name for name in FEATURES if name in wanted)


def relative_to_patient(names: Iterable[str]) -> bool:
    """Returns whether any of the named features depends on the patient's other lesions."""
    own = {f.name for f in ROW_FEATURES}
    return any(name in FEATURES and name not in own for name in names)


def needed_columns(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the metadata columns that the named features are made of, in the schema's order."""
    row = {f.name: f.expr.meta.root_names() for f in ROW_FEATURES}
    columns: set[str] = set()
    for name in names:
        roots = outlier.COLUMNS if name == outlier.NAME else FEATURES[name].expr.meta.root_names()
        if name not in row:
            columns.add(schema.PATIENT)
        for root in roots:
            columns.update([root] if name in row else row.get(root, ()))
    assert not columns & set(schema.TRAIN_ONLY)
    return tuple(name for name in schema.DTYPES if name in columns)


def compute(metadata: pl.DataFrame, names: Iterable[str]) -> pl.DataFrame:
    """Computes the named features.

    Args:
        metadata: a table as `isic.metadata.read_metadata` gives it. A row without a patient is its own patient.
        names: as `expand` gives them.

    Returns:
        `isic_id` and one column a feature in the order of `names`, in the table's row order. Numbers are Float32,
        null where blank or beyond float32's range and never NaN; categories are String.

    Raises:
        UserError: a needed column is missing.
    """
    names = tuple(names)
    columns = needed_columns(names)
    require(metadata, columns, "the metadata")
    rows = _in_canonical_order(metadata, columns).with_columns(
        f.expr.alias(f.name) for f in _needed_rows(names)
    )
    wanted = [f for f in _RELATIVE if f.name in names]
    own = [name for name in names if name in rows.columns]
    # Float32 at once, and no table kept that is done with: two hundred columns are what would set the peak of memory.
    table = rows.select(
        "_row", schema.ID, *own, *(f.expr.cast(pl.Float32).alias(f.name) for f in wanted)
    )
    if outlier.NAME in names:
        table = table.with_columns(_lof(rows))
    del rows
    table = table.select("_row", schema.ID, *(_finite(name) for name in names))
    return table.sort("_row").drop("_row")


def _in_canonical_order(metadata: pl.DataFrame, columns: Iterable[str]) -> pl.DataFrame:
    """Sorts by patient and id: sums in floating point then do not depend on the order of the file."""
    patient = with_patient(metadata)[schema.PATIENT].alias(PATIENT_CODE)
    keyed = (
        metadata.select(schema.ID, patient, *columns)
        .with_row_index("_row")
        .sort(PATIENT_CODE, schema.ID)
    )
    return keyed.with_columns(pl.col(PATIENT_CODE).rle_id().set_sorted()).rechunk()


def _needed_rows(names: tuple[str, ...]) -> list[Feature]:
    """The row features to compute: those asked for and those that relative ones are made of."""
    roots = set(names)
    for name in names:
        roots.update(FEATURES[name].expr.meta.root_names())
    return [f for f in ROW_FEATURES if f.name in roots and f.source != "raw"]


def _lof(table: pl.DataFrame) -> pl.Series:
    scores = (
        zscore(pl.col(name), WITHIN["patient"]).cast(pl.Float32).alias(name)
        for name in outlier.COLUMNS
    )
    measured = table.select(scores).to_numpy(order="c")
    return pl.Series(
        outlier.NAME,
        outlier.patient_lof(measured.astype(np.float32), table[PATIENT_CODE].to_numpy()),
    )


def _finite(name: str) -> pl.Expr:
    if name in CATEGORIES:
        return pl.col(name).cast(pl.String)
    number = pl.col(name).cast(pl.Float32)
    return pl.when(number.is_finite()).then(number).alias(name)
