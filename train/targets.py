"""The auxiliary targets of rows: 0 or 1 in a table, and the scores of their logits."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from isic.layout import Fold
from isic.metadata import clean_text
from isic.metrics import roc_auc
from isic.runtime.errors import UserError, did_you_mean
from train import distributed
from train.auxiliary import AuxTarget

AUC_PREFIX = "auc."
"""Beginning of the name of an auxiliary target's AUC."""
FLAGS = {"0": 0.0, "0.0": 0.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0}
"""Texts of a column that is itself a yes-or-no answer."""


def flag_columns(table: pl.DataFrame, targets: Sequence[AuxTarget], path: Path) -> frozenset[str]:
    """Return the columns of the targets whose values are 0 and 1, or true and false.

    Raises:
        UserError: the table lacks the column of a target.
    """
    for target in targets:
        if target.column not in table.columns:
            hint = did_you_mean(target.column, table.columns)
            raise UserError(f'--aux {target.name}: {path} has no column "{target.column}", {hint}')
    return frozenset(
        target.column
        for target in targets
        if target.text is None and _is_flag(clean_text(table[target.column], path))
    )


def _is_flag(text: pl.Series) -> bool:
    values = {FLAGS.get(value) for value in text.drop_nulls().str.to_lowercase().unique()}
    # With 1 and blanks only, the blanks mean no.
    return values <= {0.0, 1.0} and 0.0 in values


def with_targets(
    table: pl.DataFrame, targets: Sequence[AuxTarget], flags: frozenset[str], path: Path
) -> pl.DataFrame:
    """Add a Float32 column of 0, 1 and null (no target) for each target, named by its `key`.

    A target whose column the table lacks is left out.

    Args:
        flags: the columns that are answers themselves; their blanks are null.

    Raises:
        UserError: one of `flags` has another value than 0 and 1.
    """
    known = [target for target in targets if target.column in table.columns]
    absent = ", ".join(target.name for target in targets if target not in known)
    if absent and distributed.is_main():
        print(f"note: {path} lacks columns of --aux, so that its rows have no target {absent}")
    columns = []
    for target in known:
        text = clean_text(table[target.column], path)
        if target.column in flags and target.text is None:
            answer = _flag_values(text, path)
        else:
            answer = _matches(text, target.text)
        columns.append(answer.cast(pl.Float32).alias(target.key))
    return table.with_columns(columns)


def _flag_values(text: pl.Series, path: Path) -> pl.Series:
    """Return 0, 1 or null of the texts of a column of FLAGS. Raise UserError for another text."""
    values = text.str.to_lowercase().replace_strict(FLAGS, default=None, return_dtype=pl.Float32)
    other = text.filter(values.is_null() & text.is_not_null())
    if len(other):
        raise UserError(
            f'{path}: the column {text.name} has "{other[0]}", but only 0 and 1 in the dataset; '
            "correct it"
        )
    return values


def _matches(text: pl.Series, part: str | None) -> pl.Series:
    """Return whether texts contain a part, in any case, or have any value if it is None."""
    if part is None:
        return text.is_not_null()
    return text.str.to_lowercase().str.contains(part.lower(), literal=True).fill_null(False)


def target_matrix(table: pl.DataFrame, targets: Sequence[AuxTarget]) -> NDArray[np.float32]:
    """Return the targets of a table's rows, [N, K]; NaN for a row without one."""
    columns = [table[target.key].to_numpy().astype(np.float32) for target in targets]
    return np.stack(columns, axis=1) if columns else np.empty((len(table), 0), np.float32)


def refuse_single_class(
    table: pl.DataFrame,
    is_held_out: Mapping[Fold, NDArray[np.bool_]],
    targets: Sequence[AuxTarget],
) -> None:
    """Raise a UserError if all training rows of a fold have the same auxiliary target.

    Args:
        table: [N] rows with the columns of `with_targets`.
        is_held_out: [N] by fold, for the folds that are to be trained.
    """
    values = target_matrix(table, targets)
    for fold, held_out in is_held_out.items():
        training = values[~held_out]
        for target, column in zip(targets, training.T, strict=True):
            found = np.unique(column[~np.isnan(column)])
            if len(found) < 2:
                raise UserError(_single_class(target, fold, found))


def _single_class(target: AuxTarget, fold: Fold, found: NDArray[np.float32]) -> str:
    rows = f"training row of fold {fold}"
    start = f"--aux {target.name}:"
    if target.text is not None and not found.any():
        return f'{start} no {target.column} of a {rows} contains "{target.text}"; correct the text'
    if not len(found):
        return f"{start} no {rows} has a value in {target.column}; use another column"
    return (
        f"{start} the target of every {rows} is {found[0]:.0f}, so that there is nothing to learn; "
        "use another column, or a text that only some rows contain"
    )


def target_scores(
    values: NDArray[np.float32], logits: NDArray[np.float32], targets: Sequence[AuxTarget]
) -> dict[str, float]:
    """Return `auc.<name>` of each target that has both classes in the rows.

    Args:
        values: [N, K], NaN for a row without the target.
        logits: [N, K].

    Raises:
        UserError: a logit is not finite.
    """
    if not np.isfinite(logits).all():
        raise UserError(
            "the network's auxiliary logits of held-out images are not finite; lower --lr or "
            "--aux_weight"
        )
    scores = {}
    for target, value, logit in zip(targets, values.T, logits.T, strict=True):
        has_target = ~np.isnan(value)
        if len(np.unique(value[has_target])) == 2:
            scores[AUC_PREFIX + target.name] = roc_auc(value[has_target], logit[has_target])
    return scores
