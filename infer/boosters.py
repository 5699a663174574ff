"""Gradient-boosted trees behind one small interface: rows in, a text file out; the text file in, scores out.

Fitting scores its own out-of-fold rows with the text that it ships, so what is measured is what runs later.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
from numpy.typing import NDArray

from isic.errors import UserError

Matrix = NDArray[np.float32]
Predict = Callable[[Matrix, int], NDArray[np.float64]]
"""Takes a matrix and a number of threads, 0 for all; returns [N] float64 in [0, 1]."""

REFERENCE_ROWS = 31_700
"""Training rows of a fold of the challenge after undersampling: 314 positives with 100 negatives each."""

REFERENCE_MIN_DATA = 85
SMALLEST_MIN_DATA = 10

LIGHTGBM: dict[str, Any] = {
    "objective": "binary",
    "learning_rate": 0.0323,
    "max_depth": 4,
    "num_leaves": 103,
    "lambda_l1": 0.088,
    "lambda_l2": 0.004,
    "feature_fraction": 0.83,
    "feature_fraction_bynode": 0.40,
    "bagging_fraction": 0.5,
    "bagging_freq": 1,
    "scale_pos_weight": 2.8,
    "verbosity": -1,
    # Boosters are fitted beside each other, each on one thread: no thread waits for another within a tree, and the
    # bytes depend neither on the number of threads nor on which way of building histograms is the faster here.
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
}
"""The settings in wide use for this challenge, but for `min_data_in_leaf` (see `min_data`) and bagging.

Wide use is to draw 0.77 of the rows every fourth round. Half of them every round gave 0.003 more pAUC on 885 real rows,
for raw and engineered features alike, and the same on 60,000 synthetic ones.
"""


def min_data(num_rows: int) -> int:
    """Returns LightGBM's `min_data_in_leaf`: 85 for the challenge's rows, in proportion below, never under 10.

    A leaf of 85 of 31,700 rows is 0.27 % of them. With 85 of 700 a tree could not set the rare lesions apart.
    """
    return max(SMALLEST_MIN_DATA, min(REFERENCE_MIN_DATA, round(REFERENCE_MIN_DATA * num_rows / REFERENCE_ROWS)))


def fit_lightgbm(matrix: Matrix, target: NDArray[np.integer], names: Sequence[str], num_rounds: int, seed: int) -> str:
    """Fits one booster for a fixed number of rounds, on one thread, and returns it in LightGBM's text format."""
    parameters = LIGHTGBM | {"min_data_in_leaf": min_data(len(target)), "seed": seed}
    data = lightgbm.Dataset(matrix, target, feature_name=list(names), params=parameters)
    text: str = lightgbm.train(parameters, data, num_boost_round=num_rounds).model_to_string()
    return text


def load_lightgbm(text: str) -> Predict:
    """Returns the function that scores a C-ordered matrix; its scores are probabilities."""
    try:
        booster = lightgbm.Booster(model_str=text)
    except lightgbm.basic.LightGBMError as error:
        raise UserError(f"a LightGBM model does not load ({error}); fit the ensemble again") from None

    def predict(matrix: Matrix, num_threads: int) -> NDArray[np.float64]:
        assert matrix.dtype == np.float32 and matrix.flags.c_contiguous
        return np.asarray(booster.predict(matrix, num_threads=num_threads), dtype=np.float64)

    return predict


@dataclass(frozen=True)
class Library:
    """One way to fit boosters."""

    fit: Callable[[Matrix, NDArray[np.integer], Sequence[str], int, int], str]
    load: Callable[[str], Predict]
    suffix: str

    def file_name(self, name: str, fold: int, seed: int) -> str:
        return f"{name}_fold_{fold}_seed_{seed}{self.suffix}"


LIBRARIES = {"lightgbm": Library(fit_lightgbm, load_lightgbm, ".txt")}


def read_booster(path: Path, library: str) -> Predict:
    """Loads a booster from its file. Raises UserError where it is missing or not a model."""
    if not path.is_file():
        raise UserError(f"{path} is missing; fit the ensemble again")
    return LIBRARIES[library].load(path.read_text(encoding="utf-8"))
