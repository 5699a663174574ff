"""What the boosters split on: each feature's share of the gain, from the text of each library's boosters."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import polars as pl
from numpy.typing import NDArray

from isic.features import FEATURES

Gains = NDArray[np.float64]

IMAGE = "image"
GROUPS = {
    "numeric": "raw numbers",
    "category": "categories",
    "formula": "formulas",
    "patient_z": "z-scores within the patient",
    "patient_rank": "ranks within the patient",
    "patient_extreme": "ratios to the patient's extremes",
    "patient_count": "the patient's counts and sums",
    "patient_outliers": "outlying measurements",
    "patient_lof": "local outlier factor",
    "patient_location_z": "z-scores within patient and location",
    "patient_site_rank": "ranks within patient and site",
    "patient_location_rank": "ranks within patient and location",
    "patient_location_outliers": "outlying measurements at the location",
    IMAGE: "the image",
}
"""What the groups of features are called on the page."""


def lightgbm_gains(text: str, num_features: int) -> Gains:
    return np.asarray(lightgbm.Booster(model_str=text).feature_importance("gain"), dtype=np.float64)


def xgboost_gains(text: str, num_features: int) -> Gains:
    """Sums the loss that each split saved; a node without children is a leaf."""
    gains = np.zeros(num_features)
    for tree in json.loads(text)["learner"]["gradient_booster"]["model"]["trees"]:
        is_split = np.array(tree["left_children"]) >= 0
        np.add.at(
            gains,
            np.array(tree["split_indices"])[is_split],
            np.array(tree["loss_changes"])[is_split],
        )
    return gains


def catboost_gains(text: str, num_features: int) -> Gains:
    """Sums how much each split moves the prediction: CatBoost's PredictionValuesChange.

    All nodes at one depth of a symmetric tree have the same split, and bit d of a leaf's number is its side of
    split d, so the split's part is the weighted variance between leaves that differ in that bit alone.
    """
    gains = np.zeros(num_features)
    for tree in json.loads(text)["oblivious_trees"]:
        shape = (2,) * len(tree["splits"])
        values, weights = (
            np.reshape(tree[key], shape, order="F") for key in ("leaf_values", "leaf_weights")
        )
        for depth, split in enumerate(tree["splits"]):
            (low, high), (few, many) = (np.moveaxis(part, depth, 0) for part in (values, weights))
            total = np.where(few + many > 0, few + many, 1)
            gains[split["float_feature_index"]] += ((high - low) ** 2 * few * many / total).sum()
    return gains


GAINS: dict[str, Callable[[str, int], Gains]] = {
    "lightgbm": lightgbm_gains,
    "xgboost": xgboost_gains,
    "catboost": catboost_gains,
}
"""By library: a booster's text and the number D of its columns to the gain of each, [D]."""


def importance(
    root: Path, boosters: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> pl.DataFrame:
    """Returns each feature's part in an ensemble, the largest first.

    A booster's gains are scaled to add up to 1 before the mean over boosters, so each has the same say.

    Args:
        root: the ensemble's folder.
        boosters: the manifest's entries.
        names: D columns of the boosters' matrix.

    Returns:
        `feature`, `group` and `share`; no row where there are no boosters.
    """
    shares = np.zeros(len(names))
    for entry in boosters:
        gains = GAINS[entry["library"]](
            (root / entry["file"]).read_text(encoding="utf-8"), len(names)
        )
        shares += gains / max(gains.sum(), np.finfo(float).tiny) / len(boosters)
    groups = [FEATURES[name].group if name in FEATURES else IMAGE for name in names]
    table = pl.DataFrame(
        {"feature": list(names), "group": groups, "share": shares},
        schema_overrides={"group": pl.String},
    )
    return table.sort("share", "feature", descending=[True, False]).head(
        len(names) if boosters else 0
    )


def by_group(table: pl.DataFrame) -> pl.DataFrame:
    """Returns `group`, `num_features` and `share`, the largest first."""
    groups = table.group_by("group").agg(pl.len().alias("num_features"), pl.col("share").sum())
    return groups.sort("share", "group", descending=[True, False])
