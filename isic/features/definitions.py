"""A user's own features: polars SQL expressions of a row's columns, kept as text.

A file of definitions is a YAML mapping:

    norm_L: (tbp_lv_stdL + tbp_lv_color_std_mean) / tbp_lv_L
    redness:
      expr: tbp_lv_deltaA / tbp_lv_deltaL
      relative: [patient_z, patient_location_rank]

An expression reads columns of the metadata, features of this package and earlier definitions. It
computes a row's value from that row alone; comparisons with the patient's other lesions are named
in `relative`, whose words are those of `relative.FORMS`.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs
from numpy.typing import NDArray

from isic import schema
from isic.features import FEATURES, compute, finite, in_canonical_order, needed_columns
from isic.features.relative import FORMS, WITHIN
from isic.features.rounding import warn_of_rounding
from isic.metadata import BOOLEANS, require
from isic.runtime.errors import UserError, did_you_mean, first_line, warn

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
KEYS = ("expr", "relative")
IDENTITIES = (schema.ID, schema.PATIENT)
NUM_ALONE = 8
"""Rows on which an expression is also computed alone."""
CLOCK = re.compile(r"\b(now|(current|local)_?(date|time|timestamp))\b", re.IGNORECASE)
"""SQL that gives the date or the time."""
QUOTED = re.compile("""'[^']*'|"[^"]*\"""")
"""Texts and quoted names in SQL."""


@dataclass(frozen=True)
class Definition:
    """An own column and its forms relative to the patient."""

    name: str
    text: str
    """An expression in the SQL of polars."""
    relative: tuple[str, ...] = ()
    """Keys of FORMS."""
    expr: pl.Expr = field(default_factory=lambda: pl.lit(None), compare=False, repr=False)

    def __str__(self) -> str:
        return f'the definition of {self.name} ("{self.text}")'

    @property
    def names(self) -> tuple[str, ...]:
        """The features: the column itself, then its relative forms."""
        return (self.name, *(f"{self.name}_{form}" for form in self.relative))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that the expression reads."""
        return tuple(dict.fromkeys(self.expr.meta.root_names()))

    def to_json(self) -> str | dict[str, Any]:
        """Return the value that the name has in a file."""
        return {"expr": self.text, "relative": list(self.relative)} if self.relative else self.text


def parse_definitions(values: Mapping[str, Any], source: str) -> tuple[Definition, ...]:
    """Parse the content of a file of definitions.

    Raises:
        UserError: a name that cannot be one, a value of another form, an error in the SQL, a column
            that test tables lack, or an expression that reads no column.
    """
    return tuple(_parse(name, value, source) for name, value in values.items())


def _parse(name: str, value: Any, source: str) -> Definition:
    if not NAME.fullmatch(name):
        raise UserError(
            f'{source}: "{name}" is no name of a feature; use letters, digits and underscores'
        )
    given = {"expr": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not isinstance(given.get("expr"), str):
        raise UserError(
            f"{source}: {name} needs an expression as text, or {{expr: ..., relative: [...]}}, "
            f"got {value!r}"
        )
    unknown = [str(key) for key in given if key not in KEYS]
    if unknown:
        raise UserError(f'{source}: {name} has a key "{unknown[0]}"; known are: {", ".join(KEYS)}')
    definition = Definition(name, given["expr"], _forms(name, given, source))
    return _with_expression(definition, source)


def _forms(name: str, given: Mapping[str, Any], source: str) -> tuple[str, ...]:
    forms = given.get("relative") or []
    words = forms if isinstance(forms, list) else [forms]
    for word in words:
        if not isinstance(word, str) or word not in FORMS:
            raise UserError(
                f'{source}: {name} has no relative form "{word}", {did_you_mean(str(word), FORMS)}'
            )
    return tuple(dict.fromkeys(words))


def _with_expression(definition: Definition, source: str) -> Definition:
    try:
        expr = pl.sql_expr(definition.text)
        inputs = expr.meta.root_names()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise UserError(
            f"{source}: {definition} is not an SQL expression of polars ({first_line(error)}); "
            "correct it"
        ) from None
    for column in inputs:
        if schema.is_train_only(column):
            raise UserError(
                f"{source}: {definition} reads {column}, which exists only in the training table; "
                "leave it out"
            )
        if column in IDENTITIES:
            raise UserError(
                f"{source}: {definition} reads {column}, which names rows and measures nothing; "
                "leave it out, and compare a patient's lesions by `relative`"
            )
    if not inputs:
        raise UserError(f"{source}: {definition} reads no column by its name; name one")
    if CLOCK.search(QUOTED.sub("", definition.text)):
        raise UserError(
            f"{source}: {definition} reads the clock, so a row has another value every day; leave "
            "it out"
        )
    return Definition(definition.name, definition.text, definition.relative, expr)


def needed_definitions(
    definitions: Sequence[Definition], names: Collection[str]
) -> list[Definition]:
    """Return the definitions that the named features need, earlier ones first."""
    wanted = set(names)
    needed: list[Definition] = []
    for definition in reversed(definitions):
        if not wanted.isdisjoint(definition.names):
            needed.insert(0, definition)
            wanted.update(definition.inputs)
    return needed


def columns_of_definitions(
    definitions: Sequence[Definition], names: Collection[str]
) -> tuple[str, ...]:
    """Return the metadata columns that the named features need."""
    used = needed_definitions(definitions, names)
    columns = dict.fromkeys(_metadata_inputs(used))
    columns.update(dict.fromkeys(needed_columns(_feature_inputs(used))))
    for definition in used:
        for form in definition.relative:
            keys = [key for key in WITHIN[FORMS[form].within] if key in schema.DTYPES]
            columns.update(dict.fromkeys((schema.PATIENT, *keys)))
    return tuple(columns)


def _is_computed(name: str) -> bool:
    """Return whether a name is that of a feature and not of a metadata column."""
    return name in FEATURES and name not in schema.DTYPES


def _feature_inputs(definitions: Iterable[Definition]) -> tuple[str, ...]:
    read = {name for definition in definitions for name in definition.inputs}
    return tuple(name for name in FEATURES if name in read and _is_computed(name))


def _metadata_inputs(definitions: Sequence[Definition]) -> tuple[str, ...]:
    defined = {name for definition in definitions for name in definition.names}
    read = dict.fromkeys(name for definition in definitions for name in definition.inputs)
    return tuple(name for name in read if name not in defined and not _is_computed(name))


def relative_to_others(definitions: Sequence[Definition], names: Collection[str]) -> bool:
    """Return whether a named feature depends on the patient's other lesions."""
    used = needed_definitions(definitions, names)
    forms = {f"{definition.name}_{form}" for definition in used for form in definition.relative}
    read = {name for definition in used for name in definition.inputs}
    features = (FEATURES[name] for name in _feature_inputs(used))
    return not forms.isdisjoint({*names, *read}) or any(f.relative for f in features)


def compute_definitions(
    definitions: Sequence[Definition],
    metadata: pl.DataFrame,
    names: Collection[str],
    text: Collection[str] | None = None,
) -> pl.DataFrame:
    """Compute own features from the result of `read_metadata`.

    Args:
        text: the names that were text at the fit, for new rows; the others were numbers.

    Returns:
        A column per name, rows in the order of `metadata`. Categories are String; numbers and
        booleans are Float32, never NaN, null if blank or beyond float32.

    Raises:
        UserError: a column is missing, polars cannot compute an expression, or it gives text in
            place of numbers or the reverse.
    """
    require(metadata, columns_of_definitions(definitions, names), "the metadata")
    used = needed_definitions(definitions, names)
    rows = _inputs(used, metadata)
    for definition in used:
        values = _evaluate(definition, rows)
        if text is not None and (definition.name in names or definition.relative):
            values = _as_fitted(definition, values, definition.name in text)
        rows = _with_features(rows, definition, values)
    columns = (pl.col(name) if rows.schema[name] == pl.String else finite(name) for name in names)
    table = rows.select("_row", *columns)
    return table.sort("_row").drop("_row")


def _inputs(definitions: Sequence[Definition], metadata: pl.DataFrame) -> pl.DataFrame:
    """Return the columns that definitions read, sorted by patient."""
    features = _feature_inputs(definitions)
    names = tuple(feature for d in definitions for feature in d.names)
    columns = [
        name for name in columns_of_definitions(definitions, names) if name not in IDENTITIES
    ]
    computed = compute(metadata, features).drop(schema.ID)
    table = metadata.drop(features, strict=False).hstack(computed)
    rows = in_canonical_order(table, (*columns, *features))
    # Own columns of a Parquet file may have integers of 8 bits, whose sums wrap around, and NaN,
    # which polars counts as greater than any number.
    own = [name for name in columns if name not in schema.DTYPES]
    return rows.with_columns((cs.by_name(own) & cs.numeric()).cast(pl.Float64).fill_nan(None))


def _as_fitted(definition: Definition, values: pl.Series, is_text: bool) -> pl.Series:
    """Return the values as text or numbers, as they were at the fit.

    Raises:
        UserError: numbers are in place of text, or text that is no number in place of numbers.
    """
    if values.dtype == pl.String and not is_text:
        numbers = values.replace(BOOLEANS).cast(pl.Float64, strict=False)
        wrong = values.filter(numbers.is_null() & values.is_not_null())
        if len(wrong):
            raise UserError(
                f'{definition} gives text such as "{wrong[0]}", but gave numbers at the fit; '
                "correct the column that it reads, or leave the cell blank"
            )
        return _finite(numbers)
    if values.dtype != pl.String and is_text and values.null_count() < len(values):
        raise UserError(
            f"{definition} gives numbers, but gave text at the fit; give the column that it reads "
            "as text, as in the training table"
        )
    return values.cast(pl.String) if is_text else values


def _with_features(rows: pl.DataFrame, definition: Definition, values: pl.Series) -> pl.DataFrame:
    rows = rows.with_columns(values)
    forms = (
        FORMS[form].of(definition.name).cast(pl.Float32).alias(f"{definition.name}_{form}")
        for form in definition.relative
    )
    return rows.with_columns(forms)


def _evaluate(definition: Definition, rows: pl.DataFrame) -> pl.Series:
    """Return the values of an expression, [N] Float64 or String.

    Raises:
        UserError: polars cannot compute it, or it has another number of rows or another type.
    """
    try:
        # Only the named columns, because SQL can also choose columns by a pattern.
        found = rows.select(definition.inputs).select(definition.expr.alias(definition.name))
        if found.width != 1:
            raise _not_by_name(definition)
        values = found.to_series()
        is_text = values.dtype in (pl.String, pl.Categorical, pl.Enum)
        # Null: a column of a Parquet file is blank in every row.
        if is_text or values.dtype.is_numeric() or values.dtype in (pl.Boolean, pl.Null):
            values = values.cast(pl.String) if is_text else _finite(values)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise UserError(
            f"{definition} cannot be computed ({first_line(error)}); correct it"
        ) from None
    if values.dtype not in (pl.String, pl.Float64):
        raise UserError(
            f"{definition} gives values of the type {values.dtype}; "
            "give numbers, true and false, or text"
        )
    if len(values) != len(rows):
        raise _not_by_row(definition)
    return values


def _not_by_name(definition: Definition) -> UserError:
    return UserError(f"{definition} chooses columns by a pattern; name each one")


def _finite(values: pl.Series) -> pl.Series:
    """Return Float64, null for values that are not finite."""
    # One infinity would blank all z-scores of a patient.
    numbers = values.cast(pl.Float64)
    return numbers.set(~numbers.is_finite(), None)


def _not_by_row(definition: Definition) -> UserError:
    return UserError(
        f"{definition} depends on other rows, which differ between training and scoring; compute "
        "it from the row alone, and compare with the patient's lesions by `relative`"
    )


def check_definitions(definitions: Sequence[Definition], metadata: pl.DataFrame) -> None:
    """Check all definitions on a training table.

    Raises:
        UserError: an unknown column, values of another type, relative forms of text, or values that
            depend on other rows.
    """
    known = {*metadata.columns, *FEATURES} - {*schema.TRAIN_ONLY, *IDENTITIES}
    for definition in definitions:
        for name in definition.inputs:
            if name not in known:
                raise UserError(
                    f'{definition} reads the unknown column "{name}", {did_you_mean(name, known)}'
                )
        known.update(definition.names)
        taken = [name for name in definition.names if name in metadata.columns]
        if taken:
            raise UserError(f"{definition}: the table has a column {taken[0]}; choose another name")
    names = [name for definition in definitions for name in definition.names]
    require(metadata, columns_of_definitions(definitions, names), "the metadata")
    rows = _inputs(definitions, metadata)
    for definition in definitions:
        values = _evaluate(definition, rows)
        if definition.relative and values.dtype == pl.String:
            raise UserError(
                f"{definition} gives text, which has no relative forms; leave `relative` out"
            )
        _check_rows(definition, rows)
        _warn_of_hidden_steps(definition, rows, values)
        if values.dtype != pl.String:
            warn_of_rounding(str(definition), values)
        rows = _with_features(rows, definition, values)


def warn_of_untestable(
    definitions: Sequence[Definition], names: Collection[str], columns: Collection[str], source: str
) -> None:
    """Warn if named features read a metadata column that a test table lacks.

    Args:
        columns: those of the test table.
        source: its origin, for the message.
    """
    used = needed_definitions(definitions, names)
    lacking = [name for name in _metadata_inputs(used) if name not in columns]
    if lacking:
        definition = next(each for each in used if lacking[0] in each.inputs)
        warn(
            f"{definition} reads {lacking[0]}, which {source} lacks, so none of its rows can be "
            "scored; leave it out to score them"
        )


def _check_rows(definition: Definition, rows: pl.DataFrame) -> None:
    """Raise a UserError if a value changes with the rows around it, or their order."""
    rows = rows.select(definition.inputs)
    order = np.random.default_rng(0).permutation(len(rows))
    alone = [row[None] for row in order[:NUM_ALONE]]
    parts = [part for part in (order, *np.array_split(order, 2), *alone) if len(part)]
    tables = [rows[part] for part in parts]
    # A step by itself, because it may count in few rows: COALESCE(x, AVG(x)) is the mean only if x
    # is blank.
    for step in _steps(definition.expr):
        expected = _step_values(step, rows)
        if not step.meta.root_names():  # a number, or the count of the rows
            same = _equal(_step_values(step, rows[:1]), expected)
        else:
            same = len(expected) == len(rows) and all(
                _equal(_step_values(step, table), expected[part])
                for part, table in zip(parts, tables, strict=True)
            )
        if not same:
            raise _not_by_row(definition)


def _steps(expr: pl.Expr) -> Iterator[pl.Expr]:
    """Yield an expression and, in turn, the expressions that it is made of."""
    yield expr
    for step in expr.meta.pop():
        yield from _steps(step)


def _step_values(step: pl.Expr, rows: pl.DataFrame) -> pl.Series:
    values = rows.select(step.alias("step")).to_series()
    is_number = values.dtype.is_numeric() or values.dtype == pl.Boolean
    return values.cast(pl.Float64) if is_number else values


def _warn_of_hidden_steps(definition: Definition, rows: pl.DataFrame, values: pl.Series) -> None:
    """Warn if a step has no finite value in rows whose result is not blank."""
    is_hidden = _is_not_finite(definition.expr, rows, np.ones(len(rows), bool))
    num_rows = int((is_hidden & values.is_not_null().to_numpy()).sum())
    if num_rows:
        warn(
            f"{definition} has a step without a finite value, such as a division by zero, in "
            f"{num_rows:,} rows whose result is not blank: NaN and infinity count as greater than "
            "any number there, and -infinity as less; check these rows, or make the step blank, as "
            "by NULLIF(divisor, 0)"
        )


def _is_not_finite(
    expr: pl.Expr, rows: pl.DataFrame, counts: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return [N] whether a step has no finite value in a row.

    Args:
        counts: [N] whether the expression counts in a row; CASE computes all of its branches.
    """
    if not expr.meta.root_names():
        return np.zeros(len(rows), bool)
    values = _step_values(expr, rows)
    found = np.zeros(len(rows), bool)
    if values.dtype == pl.Float64:
        found = counts & ~values.is_finite().fill_null(True).to_numpy()
    match expr.meta.pop():
        case [condition, otherwise, then] if _is_case(expr, condition, rows):
            is_true = rows.select(condition.fill_null(False).alias("step")).to_series().to_numpy()
            found |= _is_not_finite(condition, rows, counts)
            found |= _is_not_finite(otherwise, rows, counts & ~is_true)
            found |= _is_not_finite(then, rows, counts & is_true)
        case steps:
            for step in steps:
                found |= _is_not_finite(step, rows, counts)
    return found


def _is_case(expr: pl.Expr, condition: pl.Expr, rows: pl.DataFrame) -> bool:
    """Return whether an expression of three steps is a CASE, the first step of which decides."""
    # Only its text tells, and a function of a CASE and two other steps begins alike.
    is_boolean = rows.select(condition.alias("step")).dtypes == [pl.Boolean]
    return is_boolean and str(expr).startswith(".when(")


def _equal(first: pl.Series, second: pl.Series) -> bool:
    if first.dtype != pl.Float64:
        return first.equals(second, null_equal=True)
    if not first.is_null().equals(second.is_null()):
        return False
    # Vectorised functions may round the last bit of a value differently at the end of a table.
    numbers = (first.fill_null(0).to_numpy(), second.fill_null(0).to_numpy())
    return np.allclose(*numbers, rtol=1e-9, atol=0, equal_nan=True)
