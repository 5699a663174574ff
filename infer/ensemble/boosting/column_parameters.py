"""Parameters of the libraries on columns, such as constraints: by name, as columns differ by fit.

`infer select` fits lists of columns, and a set of features has hundreds, so positions would be on
other columns than meant.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from isic.runtime.errors import UserError, did_you_mean

NUMBERS = "{clin_size_long_diam_mm: 1}"
"""The form of a parameter with a number by column."""
GROUPS = "[[clin_size_long_diam_mm, tbp_lv_areaMM2]]"
"""The form of a parameter of groups of columns."""


def refuse_other_form(library: str, name: str, value: Any, form: str) -> None:
    """Raise a UserError if the value of a parameter has not its form, NUMBERS or GROUPS."""
    if not (_are_numbers(value) if form == NUMBERS else _are_groups(value)):
        raise UserError(
            f"{library}: {name} in extra names columns, such as {{{name}: {form}}}; "
            f"change --{library}"
        )


def _are_numbers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and type(number) in (int, float) for name, number in value.items()
    )


def _are_groups(value: Any) -> bool:
    return isinstance(value, Sequence) and all(
        isinstance(group, Sequence)
        and not isinstance(group, str)
        and all(isinstance(name, str) for name in group)
        for group in value
    )


def refuse_unknown_columns(
    library: str, name: str, value: Any, form: str, columns: Sequence[str]
) -> None:
    """Raise a UserError if a parameter names a column that there is not."""
    for column in _named(value, form):
        if column not in columns:
            raise UserError(
                f'{library}: {name} in extra names "{column}", which is not among the features, '
                f"{did_you_mean(column, columns)}"
            )


def _named(value: Any, form: str) -> Iterator[str]:
    for part in value:
        yield from [part] if form == NUMBERS else part


def on_columns(value: Any, form: str, columns: Sequence[str]) -> Any:
    """Return the part of a parameter that is on some columns, possibly empty."""
    known = {*columns}
    if form == NUMBERS:
        return {name: number for name, number in value.items() if name in known}
    parts = ([name for name in group if name in known] for group in value)
    return [part for part in parts if part]


def by_position(value: Any, form: str, columns: Sequence[str], other: float) -> list[Any]:
    """Return a parameter by the positions of columns.

    Args:
        value: on some of the columns.
        other: the number of the other columns.
    """
    if form == NUMBERS:
        return [value.get(name, other) for name in columns]
    place = {name: number for number, name in enumerate(columns)}
    return [[place[name] for name in group] for group in value]
