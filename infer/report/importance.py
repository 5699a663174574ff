"""Feature importance: each feature's share of the gain of a booster's splits."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from infer.ensemble.boosting.libraries import LIBRARIES
from isic.features import FEATURES

IMAGE = "image"
OWN = "own"
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
    OWN: "own columns",
    IMAGE: "the image",
}
"""Name of each group of features on the page."""


def importance(
    root: Path,
    boosters: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    own: Collection[str] = (),
) -> pl.DataFrame:
    """Return each feature's importance in an ensemble, the largest first.

    Args:
        names: D columns of the boosters' matrix.
        own: those that the user defined or brought.

    Returns:
        `feature`, `group` and `share`; no rows if there are no boosters.
    """
    shares = np.zeros(len(names))
    for entry in boosters:
        text = (root / entry["file"]).read_text(encoding="utf-8")
        # Gains of a booster are scaled to add up to 1, so that each booster counts equally.
        gains = LIBRARIES[entry["library"]].gains(text, len(names))
        shares += gains / max(gains.sum(), np.finfo(float).tiny) / len(boosters)
    other = {name: OWN if name in own else IMAGE for name in names}
    groups = [FEATURES[name].group if name in FEATURES else other[name] for name in names]
    table = pl.DataFrame(
        {"feature": list(names), "group": groups, "share": shares},
        schema_overrides={"group": pl.String},
    ).sort("share", "feature", descending=[True, False])
    # An ensemble of the image model only has no trees.
    return table if boosters else table.clear()


def share_by_group(table: pl.DataFrame) -> pl.DataFrame:
    """Return `group`, `num_features` and `share`, the largest first."""
    groups = table.group_by("group").agg(pl.len().alias("num_features"), pl.col("share").sum())
    return groups.sort("share", "group", descending=[True, False])
