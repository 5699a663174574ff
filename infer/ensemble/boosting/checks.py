"""Try a library on a few rows before a fit: does it know its extra parameters, and the device?"""

import contextlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infer.ensemble.boosting.column_parameters import refuse_unknown_columns
from infer.ensemble.boosting.libraries import (
    DEVICE,
    EXTRA,
    LIBRARIES,
    REFERENCE_ROWS,
    Matrix,
    fit_booster,
    refuse_parameter,
)
from isic.runtime.errors import UserError, did_you_mean, first_line

NUM_ROWS = 200
MANY_ROWS = REFERENCE_ROWS
"""Rows of a second trial: `min_sum_hessian_in_leaf: 60` allows no split of the first one's."""
NUM_ROUNDS = 2

UNUSED = re.compile(r"Parameters: \{ (.+) \} are not used")
"""The warning of XGBoost for unknown parameters, in quotes."""
NO_GPU = "Device is changed from GPU to CPU"
"""Its warning if it falls back to the CPU."""


def check_library(library: str, parameters: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise a UserError if a library lacks the device or does not know an extra parameter.

    Args:
        parameters: as `FitSettings.parameters` returns them; the defaults are known to work.
        names: [D] columns of the boosters' matrix.
    """
    extra = parameters.get(EXTRA, {})
    on_gpu = parameters.get(DEVICE, "cpu") != "cpu"
    if library == "lightgbm":
        _check_lightgbm_names(extra)
    for key, form in LIBRARIES[library].columns.items():
        if key in extra:
            refuse_unknown_columns(library, key, extra[key], form, names)
    if extra:
        _try_extra(library, {**parameters, DEVICE: "cpu"}, names)
    if on_gpu:
        try:
            _try(library, parameters, names)
        except UserError as error:
            reason = re.sub(r"; change --\w+$", "", str(error))
            raise UserError(
                f"--device cuda: {reason}; use --device cpu, or install {library} built for CUDA"
            ) from None


def _try_extra(library: str, parameters: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise a UserError if extra parameters do not work, or leave nothing to tell rows apart."""
    tells_apart = any(_try(library, parameters, names, rows) for rows in (NUM_ROWS, MANY_ROWS))
    # Other settings may be to blame, such as `min_data_in_leaf`.
    if not tells_apart and _try(library, {**parameters, EXTRA: {}}, names, MANY_ROWS):
        raise UserError(
            f"{library} scores all rows alike with the extra parameters "
            f"{', '.join(parameters[EXTRA])}; change --{library}"
        )


def _try(
    library: str, parameters: Mapping[str, Any], names: Sequence[str], num_rows: int = NUM_ROWS
) -> bool:
    """Fit two trees on random rows, load them, and read their gains.

    Returns:
        Whether the scores differ.

    Raises:
        UserError: the library refuses a parameter, or makes a model that is not readable.
    """
    matrix, target = _random_rows(num_rows, len(names))
    few = {**parameters, "num_rounds": NUM_ROUNDS}
    extra = parameters.get(EXTRA, {})
    with _capture() as messages:
        try:
            text = fit_booster(library, matrix, target, names, few, 0)
        except UserError:
            raise
        except Exception as error:
            # A library passes parameters through its code unchecked, so that any type is raised.
            raise _refusal(library, extra, "does not fit", error) from None
    for message in messages:
        _refuse_warning(library, message, extra)
    try:
        row = LIBRARIES[library]
        scores = row.load(text)(matrix, 1)
        row.gains(text, len(names))
    except Exception as error:  # likewise
        problem = "makes a model that this toolkit cannot read"
        raise _refusal(library, extra, problem, error) from None
    return bool(np.ptp(scores) > 0)


def _random_rows(num_rows: int, num_columns: int) -> tuple[Matrix, NDArray[np.integer]]:
    """Return [N, D] columns, each of which is high and low where the target, [N], is 1."""
    # Each: a booster may see few of them by chance. High and low: so that it may only rise or fall.
    random = np.random.default_rng(0)
    hidden = random.standard_normal((num_rows, 1), dtype=np.float32)
    noise = random.standard_normal((num_rows, num_columns), dtype=np.float32)
    return hidden + 0.2 * noise, (np.abs(hidden[:, 0]) > 1).astype(np.int8)


def _refusal(library: str, extra: Mapping[str, Any], problem: str, error: Exception) -> UserError:
    given = f" with the extra parameters {', '.join(extra)}" if extra else ""
    return UserError(f"{library} {problem}{given} ({first_line(error)}); change --{library}")


@contextlib.contextmanager
def _capture() -> Iterator[list[str]]:
    """Yield a list that gets the warnings of the block and the text that C++ writes to stderr."""
    # XGBoost warns through Python only in the thread that imported it, else on stderr; LightGBM
    # repeats its errors there.
    messages: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        os.dup2(written.fileno(), 2)
        try:
            yield messages
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            messages += [str(warning.message) for warning in caught]
            messages.append(written.read().decode(errors="replace"))


def _refuse_warning(library: str, message: str, extra: Mapping[str, Any]) -> None:
    if NO_GPU in message:
        raise UserError(f"{library} found no GPU that it can use")
    unused = UNUSED.search(message)
    names = [name for name in extra if unused and f'"{name}"' in unused[1]]
    if names:
        raise UserError(f'{library} has no parameter "{names[0]}"; correct --{library}')


def _check_lightgbm_names(extra: Mapping[str, Any]) -> None:
    """Raise a UserError for a name that LightGBM does not know or has in place of a setting."""
    if not extra:
        return
    # LightGBM only warns of unknown names, and ignores one of two names of a parameter.
    aliases: dict[str, list[str]] = import_module(
        "lightgbm.basic"
    )._ConfigAliases._get_all_param_aliases()
    canonical = {alias: name for name, others in aliases.items() for alias in (name, *others)}
    for key in extra:
        if key not in canonical:
            raise UserError(f'lightgbm has no parameter "{key}", {did_you_mean(key, canonical)}')
        name = canonical[key]
        refuse_parameter("lightgbm", key, name)
        if name in LIBRARIES["lightgbm"].columns and key != name:
            raise UserError(f"lightgbm: {key} in extra has another name here; write {name}: ...")
