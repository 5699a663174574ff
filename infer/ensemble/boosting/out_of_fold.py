"""Fit a booster per library, fold and seed, and score each fold's held-out rows with it."""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray
from tqdm import tqdm

from infer.ensemble.blends.ranks import Scores, model_name
from infer.ensemble.boosting.libraries import LIBRARIES, Predict, fit_booster
from infer.ensemble.boosting.thinning import ThinnedTables
from infer.ensemble.boosting.training_table import TrainingTable
from infer.ensemble.settings import FitSettings
from isic.features import Encoding, fit_encoding
from isic.runtime.errors import UserError
from isic.runtime.machine import num_cores
from isic.runtime.progress import TimeLeft

BLANK_STREAM = 2
"""So that the blanks are independent of a booster's other random choices."""

BoosterKey = tuple[str, int, int]
"""Library, fold and seed of a booster."""


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
    table: TrainingTable,
    names: tuple[str, ...] | Mapping[int, tuple[str, ...]],
    target: NDArray[np.integer],
    fold: NDArray[np.integer],
    settings: FitSettings,
    thinned: ThinnedTables | None = None,
    fold_ids: Sequence[int] | None = None,
) -> FitResult:
    """Fit all boosters of an ensemble and score every row out of fold.

    Args:
        names: columns of the boosters' matrix, the same for all folds or by fold.
        target, fold: [N].
        thinned: tables of the same rows to fit on, by seed; held-out rows are scored from `table`.
        fold_ids: the folds that boosters are fitted without; those of `fold` if None.

    Raises:
        UserError: the rows outside a fold are of one class.
    """
    assert (settings.thin_patients > 0) == (thinned is not None)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    fold_ids = np.unique(fold).tolist() if fold_ids is None else fold_ids
    keys = list(itertools.product(settings.libraries, fold_ids, seeds))
    features = table.features
    result = FitResult()
    for library, _, seed in keys:
        result.scores[model_name(library, seed)] = np.zeros(len(features))
    by_fold = names if isinstance(names, Mapping) else dict.fromkeys(fold_ids, names)
    for k in fold_ids:
        _need_both_classes(target[fold != k], k)
        result.encodings[k] = fit_encoding(features.filter(pl.Series(fold != k)), by_fold[k])
    num_uses = len(settings.libraries) * len(fold_ids)

    def fit_one(key: BoosterKey) -> tuple[str, Scores]:
        _, k, seed = key
        encoding = result.encodings[k]
        training = thinned.take(seed, num_uses) if thinned else table
        text = fit_outside(key, training, target, fold, encoding, settings)
        return text, _score(key, text, features.filter(pl.Series(fold == k)), encoding)

    # By seed, so that few thinned tables are in memory at a time.
    order = sorted(keys, key=lambda key: key[2])
    texts: dict[BoosterKey, str] = {}
    for key, (text, score) in zip(order, _in_threads(fit_one, order, settings), strict=True):
        library, k, seed = key
        texts[key] = text
        result.scores[model_name(library, seed)][fold == k] = score
    result.boosters.update({key: texts[key] for key in keys})
    return result


def _in_threads(
    fit_one: Callable[[BoosterKey], tuple[str, Scores]],
    keys: Sequence[BoosterKey],
    settings: FitSettings,
) -> Iterator[tuple[str, Scores]]:
    """Yield the results of `fit_one` in the order of the keys, and show the progress."""
    # Threads rather than processes: the libraries release the GIL, and the table is shared.
    pool = ThreadPoolExecutor(num_at_once(settings))
    try:
        fitted = tqdm(pool.map(fit_one, keys), "boosters", len(keys), leave=False, disable=None)
        # A bar shows the time itself.
        time_left = TimeLeft(len(keys), "fitting") if fitted.disable else None
        for result in fitted:
            yield result
            if time_left:
                time_left.advance()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C the rest is of no use


def num_at_once(settings: FitSettings) -> int:
    """Return the number of boosters that are fitted at the same time."""
    return (settings.num_threads or num_cores()) if settings.device == "cpu" else 1


def fit_outside(
    key: BoosterKey,
    table: TrainingTable,
    target: NDArray[np.integer],
    fold: NDArray[np.integer],
    encoding: Encoding,
    settings: FitSettings,
) -> str:
    """Fit one booster on the rows outside a fold. Return its text.

    Args:
        target, fold: [N]; the table may lack the rows of the fold.
        encoding: of the fold.
    """
    library, k, seed = key
    rows = undersample(target, np.flatnonzero(fold != k), settings.negatives, (seed, k))
    matrix = encoding.transform(table.take(rows, seed, k))
    blanks = np.random.default_rng((seed, k, BLANK_STREAM))
    encoding.blank_categories(matrix, settings.blank_share, blanks, settings.blank)
    parameters = settings.parameters(library)
    return fit_booster(library, matrix, target[rows], encoding.names, parameters, seed)


def _score(key: BoosterKey, text: str, table: pl.DataFrame, encoding: Encoding) -> Scores:
    """Return [N] the scores of a table, possibly of no rows, by one booster."""
    if table.is_empty():
        return np.zeros(0)
    # By the text, as in prediction, not by the booster in memory.
    predict = LIBRARIES[key[0]].load(text)
    return predict(encoding.transform(table), 1)


def scores_by_fold(
    keys: Collection[BoosterKey],
    load: Callable[[BoosterKey], Predict],
    encodings: Mapping[int, Encoding],
    table: pl.DataFrame,
    num_threads: int,
) -> list[dict[str, Scores]]:
    """Return, per fold, [N] each model's scores of other rows by the booster of the fold.

    Args:
        load: returns a booster.
        encodings: by fold.
    """
    found = []
    for fold, encoding in encodings.items():
        matrix = encoding.transform(table)
        found.append(
            {
                model_name(library, seed): load((library, of_fold, seed))(matrix, num_threads)
                for library, of_fold, seed in keys
                if of_fold == fold
            }
        )
    return found


def mean_of_folds(by_fold: Sequence[Mapping[str, Scores]]) -> dict[str, Scores]:
    """Return [N] the mean scores of each model."""
    return {
        name: np.asarray(sum(scores[name] for scores in by_fold) / len(by_fold))
        for name in by_fold[0]
    }


def score_held_out(
    result: FitResult, table: pl.DataFrame, fold: NDArray[np.integer], num_threads: int = 0
) -> dict[str, Scores]:
    """Return [N] scores by model name, each row's by the boosters of its fold.

    Args:
        table: other features of the rows of the fit, in their order.
        fold: [N].
        num_threads: 0 for all cores.
    """
    num_threads = num_threads or num_cores()
    scores = {name: np.zeros(len(table)) for name in result.scores}
    for k, encoding in result.encodings.items():
        matrix = encoding.transform(table.filter(pl.Series(fold == k)))
        for (library, of_fold, seed), text in result.boosters.items():
            if of_fold == k:
                predict = LIBRARIES[library].load(text)
                scores[model_name(library, seed)][fold == k] = predict(matrix, num_threads)
    return scores


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
