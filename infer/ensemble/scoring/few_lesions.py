"""Out-of-fold scores if only some lesions of each held-out patient are known."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import polars as pl

from infer.ensemble.blends.ranks import blend
from infer.ensemble.boosting.out_of_fold import FitResult, score_held_out
from infer.ensemble.boosting.thinning import split_patients
from infer.ensemble.lesions import count_lesions
from isic import schema
from isic.metrics import pauc

SIZES = (1, 2, 3, 5, 10, 20)
"""Numbers of a patient's lesions that are scored together."""
ALL = "all"
"""Key of the scores of whole patients."""


def split_by_lesions(
    metadata: pl.DataFrame, sizes: tuple[int, ...] = SIZES
) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield each size and the table with patients split into random groups of that size.

    The groups are always the same. A size that no patient exceeds is left out.
    """
    for size in sizes:
        if size < count_lesions(metadata).max():
            yield size, split_patients(metadata, size, np.random.default_rng(size))


def pauc_by_lesions(
    result: FitResult,
    metadata: pl.DataFrame,
    frame: Callable[[pl.DataFrame], pl.DataFrame],
    fold: pl.Series,
    weights: Mapping[str, float],
    num_threads: int = 0,
) -> dict[str, float]:
    """Return the pooled out-of-fold pAUC of the blend by number of lesions, and of ALL.

    A group of lesions is scored as if it were the whole patient. All rows are scored for each
    number, so that the values can be compared.

    Args:
        frame: computes the features of the rows, whose patients are others.
        fold: [N], of the rows of `metadata`.
        weights: by library.
        num_threads: 0 for all cores.
    """
    target = metadata[schema.TARGET].to_numpy()
    found = {}
    for size, groups in split_by_lesions(metadata):
        scores = score_held_out(result, frame(groups), fold.to_numpy(), num_threads)
        found[str(size)] = pauc(target, blend(scores, weights, result.scores))
    found[ALL] = pauc(target, blend(result.scores, weights, result.scores))
    return found


def format_by_lesions(found: Mapping[str, float]) -> str:
    """Return the result of `pauc_by_lesions` as two lines of text."""
    heading = "lesions scored together"
    values = {size: f"{value:.4f}" for size, value in found.items()}
    first = "".join(f"{size:>8}" for size in values)
    second = "".join(f"{value:>8}" for value in values.values())
    return f"{heading}{first}\n{'pAUC pooled':{len(heading)}}{second}"
