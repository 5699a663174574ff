"""Fit a booster per library, fold and seed, and score each fold's held-out rows with it."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray
from tqdm import tqdm

from infer.ensemble.blend import Scores, model_name
from infer.ensemble.boosters import LIBRARIES, fit_booster
from infer.ensemble.settings import FitSettings
from isic.features import Encoding, fit_encoding
from isic.runtime.errors import UserError
from isic.runtime.machine import num_cores
from isic.runtime.progress import TimeLeft

BLANK_STREAM = 2
"""So that the blanks are independent of a booster's other random choices."""

BoosterKey = tuple[str, int, int]
"""Library, fold and seed of a booster."""
NoisyColumns = Callable[[tuple[int, int]], pl.DataFrame]
"""Makes columns from the seed and fold of a booster."""


def noise_of(noisy: NoisyColumns | None, rows: NDArray[np.bool_]) -> NoisyColumns | None:
    """Return the same for a part of the rows, [N] whether a row belongs to it."""
    if noisy is None:
        return None
    mask = pl.Series(rows)
    return lambda key: noisy(key).filter(mask)


@dataclass(frozen=True)
class FitResult:
    """Fitted boosters, the encodings of their features, and their out-of-fold scores."""

    boosters: dict[BoosterKey, str] = field(default_factory=dict)
    """Text by library, fold and seed."""
    encodings: dict[int, Encoding] = field(default_factory=dict)
    """By fold."""
    scores: dict[str, Scores] = field(default_factory=dict)
    """[N] by model name."""


def fit_boosters(
    table: pl.DataFrame,
    names: tuple[str, ...] | Mapping[int, tuple[str, ...]],
    target: NDArray[np.integer],
    fold: NDArray[np.integer],
    settings: FitSettings,
    noisy: NoisyColumns | None = None,
    fold_ids: Sequence[int] | None = None,
) -> FitResult:
    """Fit all boosters of an ensemble and score every row out of fold.

    Args:
        names: columns of the boosters' matrix, the same for all folds or by fold.
        target, fold: [N].
        noisy: makes the columns of the table, [N] each, that are replaced in the rows that a
            booster is fitted on.
        fold_ids: the folds that boosters are fitted without; those of `fold` if None.

    Raises:
        UserError: the rows outside a fold are of one class.
    """
    seeds = range(settings.seed, settings.seed + settings.seeds)
    fold_ids = np.unique(fold).tolist() if fold_ids is None else fold_ids
    keys = list(itertools.product(settings.libraries, fold_ids, seeds))
    result = FitResult()
    for library, _, seed in keys:
        result.scores[model_name(library, seed)] = np.zeros(len(table))
    by_fold = names if isinstance(names, Mapping) else dict.fromkeys(fold_ids, names)
    for k in fold_ids:
        _need_both_classes(target[fold != k], k)
        result.encodings[k] = fit_encoding(table.filter(pl.Series(fold != k)), by_fold[k])

    def fit_one(key: BoosterKey) -> tuple[str, Scores]:
        _, k, _ = key
        return _fit_and_score(key, table, target, fold, result.encodings[k], settings, noisy)

    # Threads rather than processes: the libraries release the GIL, and the table is shared.
    # A GPU fits one booster at a time.
    num_threads = settings.num_threads or num_cores()
    pool = ThreadPoolExecutor(num_threads if settings.device == "cpu" else 1)
    try:
        fitted = tqdm(pool.map(fit_one, keys), "boosters", len(keys), leave=False, disable=None)
        # A bar shows the time itself.
        time_left = TimeLeft(len(keys), "fitting") if fitted.disable else None
        for key, (text, score) in zip(keys, fitted, strict=True):
            library, k, seed = key
            result.boosters[key] = text
            result.scores[model_name(library, seed)][fold == k] = score
            if time_left:
                time_left.advance()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C the rest is of no use
    return result


def _fit_and_score(
    key: BoosterKey,
    table: pl.DataFrame,
    target: NDArray[np.integer],
    fold: NDArray[np.integer],
    encoding: Encoding,
    settings: FitSettings,
    noisy: NoisyColumns | None,
) -> tuple[str, Scores]:
    """Fit one booster outside a fold. Return its text, and the scores of the fold's rows."""
    library, k, _ = key
    text = fit_outside(key, table, target, fold, encoding, settings, noisy)
    # Scored by the text, as in prediction, not by the booster in memory.
    predict = LIBRARIES[library].load(text)
    held_out = table.filter(pl.Series(fold == k))
    if held_out.is_empty():
        return text, np.zeros(0)
    return text, predict(encoding.transform(held_out), 1)


def fit_outside(
    key: BoosterKey,
    table: pl.DataFrame,
    target: NDArray[np.integer],
    fold: NDArray[np.integer],
    encoding: Encoding,
    settings: FitSettings,
    noisy: NoisyColumns | None = None,
) -> str:
    """Fit one booster on the rows outside a fold. Return its text.

    Args:
        target, fold: [N]; the table may lack the rows of the fold.
        encoding: of the fold.
        noisy: see `fit_boosters`.
    """
    library, k, seed = key
    rows = undersample(target, np.flatnonzero(fold != k), settings.negatives, (seed, k))
    training = table[rows]
    if noisy:
        training = training.with_columns(noisy((seed, k))[rows])
    matrix = encoding.transform(training)
    blanks = np.random.default_rng((seed, k, BLANK_STREAM))
    encoding.blank_categories(matrix, settings.blank_share, blanks)
    parameters = settings.parameters(library)
    return fit_booster(library, matrix, target[rows], encoding.names, parameters, seed)


def undersample(
    target: NDArray[np.integer], rows: NDArray[np.int64], negatives: float, seed: tuple[int, int]
) -> NDArray[np.int64]:
    """Return all positive rows and a sample of the negative ones, sorted.

    Args:
        target: [N], 0 or 1.
        rows: the indices to choose from.
        negatives: per positive; at least one in all.
    """
    positive = rows[target[rows] == 1]
    negative = rows[target[rows] == 0]
    num_kept = max(int(len(positive) * negatives), 1)
    if num_kept < len(negative):
        negative = np.random.default_rng(seed).choice(negative, num_kept, replace=False)
    return np.sort(np.concatenate([positive, negative]))


def _need_both_classes(target: NDArray[np.integer], fold: int) -> None:
    if target.min() == target.max():
        raise UserError(
            f"the rows outside fold {fold} all have target {target[0]}; "
            "use fewer folds or more data"
        )
