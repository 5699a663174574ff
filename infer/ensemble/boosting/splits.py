"""Out-of-fold scores over several fold plans, so that a comparison covers the choice of the folds.

Only the first plan's boosters are kept, for `infer predict`. `oof_splits.parquet` has a row per
plan and training row:

| column | content |
| --- | --- |
| `isic_id`, `split_seed`, `fold` | a training row, and its fold in the plan of that split seed |
| `seed_<s>` | the out-of-fold score of the boosters of one seed |
| `blend` | the out-of-fold score of all boosters |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.ensemble.artifact import SPLITS_FILE
from infer.ensemble.blends.ranks import Scores, blend, blend_by_seed
from infer.ensemble.boosting.out_of_fold import fit_boosters
from infer.ensemble.rows import FitRows
from isic import schema
from isic.folds import draw_folds
from isic.metrics import pauc
from isic.runtime.errors import UserError
from isic.tables import read_parquet, write_parquet

SEED_PREFIX = "seed_"


@dataclass(frozen=True)
class PlanScores:
    """The out-of-fold scores of one fold plan; [N] each, in the order of the ids."""

    fold: NDArray[np.integer]
    seeds: Mapping[int, Scores]
    """By seed."""
    blend: Scores

    def columns(self) -> dict[str, NDArray[Any]]:
        seeds = {f"{SEED_PREFIX}{seed}": score for seed, score in self.seeds.items()}
        return {"fold": self.fold, **seeds, "blend": self.blend}


Plans = Mapping[int, PlanScores]
"""By split seed, the first one that of `oof.parquet`; empty if there is no other plan."""


def plan_scores(
    fold: NDArray[np.integer], models: Mapping[str, Scores], weights: Mapping[str, float]
) -> PlanScores:
    """Return the scores of a plan from those of its models.

    Args:
        fold: [N].
        models: [N] out-of-fold scores by model name.
        weights: by library.
    """
    return PlanScores(fold, blend_by_seed(models, weights), blend(models, weights, models))


def fit_plans(rows: FitRows, models: Mapping[str, Scores]) -> Plans:
    """Fit the boosters of the fold plans after the first, and return the scores of all plans.

    Args:
        models: [N] the out-of-fold scores of the first plan's models, by name.

    Raises:
        UserError: the rows outside a fold are of one class.
    """
    settings = rows.settings
    if settings.splits == 1:
        return {}
    fold = rows.fold.to_numpy()
    num_folds = len(np.unique(fold))
    plans = {settings.seed_of_split: plan_scores(fold, models, rows.weights)}
    for number in range(2, settings.splits + 1):
        split_seed = settings.seed_of_split + number - 1
        print(
            f"fitting fold plan {number} of {settings.splits}, split seed {split_seed}", flush=True
        )
        fold = draw_folds(rows.metadata, num_folds, split_seed).of(rows.metadata).to_numpy()
        fitted = fit_boosters(rows.table, rows.names, rows.target, fold, settings, rows.thinned)
        plans[split_seed] = plan_scores(fold, fitted.scores, rows.weights)
    return plans


def write_plans(root: Path, ids: pl.Series, plans: Plans) -> list[str]:
    """Write the scores of several plans. Return the names of the files."""
    if not plans:
        return []
    tables = []
    for split_seed, plan in plans.items():
        columns = pl.DataFrame(plan.columns()).cast({"fold": pl.Int8})
        seed = pl.lit(split_seed, dtype=pl.Int64).alias("split_seed")
        tables.append(columns.select(ids, seed, pl.all()))
    write_parquet(root / SPLITS_FILE, pl.concat(tables))
    return [SPLITS_FILE]


def read_plans(root: Path) -> Plans:
    """Read the scores of several plans from the folder of an ensemble or blend; empty if none.

    They are in the order of the ids.
    """
    if not (root / SPLITS_FILE).is_file():
        return {}
    table = read_parquet(root / SPLITS_FILE).sort("split_seed", schema.ID)
    groups = table.partition_by("split_seed", as_dict=True, include_key=False)
    return {int(split_seed): _plan_of(rows) for (split_seed,), rows in groups.items()}


def _plan_of(rows: pl.DataFrame) -> PlanScores:
    names = [name for name in rows.columns if name.startswith(SEED_PREFIX)]
    seeds = {int(name.removeprefix(SEED_PREFIX)): rows[name].to_numpy() for name in names}
    return PlanScores(rows["fold"].to_numpy(), seeds, rows["blend"].to_numpy())


def split_seeds(manifest: Mapping[str, Any]) -> list[int]:
    """Return the split seeds of an ensemble's or a blend's plans; empty if it has one plan."""
    return [int(split_seed) for split_seed in manifest["scores"].get("pauc_by_split", ())]


def summarise_plans(plans: Plans, target: NDArray[np.integer]) -> dict[str, Any]:
    """Return `pauc_by_split`, pooled, with `pauc_mean_of_splits` and `pauc_std_of_splits`.

    Nothing if there are no plans. The deviation is that of a sample.
    """
    if not plans:
        return {}
    by_split = {str(split_seed): pauc(target, plan.blend) for split_seed, plan in plans.items()}
    values = list(by_split.values())
    return {
        "pauc_by_split": by_split,
        "pauc_mean_of_splits": float(np.mean(values)),
        "pauc_std_of_splits": float(np.std(values, ddof=1)),
    }


PlanPairs = Sequence[tuple[PlanScores, PlanScores]]


def shared_plans(first: Plans, second: Plans) -> PlanPairs:
    """Return the plans that both sides have, in pairs.

    Raises:
        UserError: the same split seed has other folds.
    """
    pairs = []
    for split_seed in first:
        if split_seed in second:
            pair = first[split_seed], second[split_seed]
            if not np.array_equal(pair[0].fold, pair[1].fold):
                raise UserError(
                    f"the ensembles have other folds for split seed {split_seed}; fit both again"
                )
            pairs.append(pair)
    return pairs


def paired_by_fold(target: NDArray[np.integer], pairs: PlanPairs) -> NDArray[np.float64]:
    """Return [F, 2] the pAUC of both sides in each fold of each plan, mean over the side's seeds.

    Folds with one class are left out. A blend whose members have no seed in common has one score.
    """
    values = []
    for first, second in pairs:
        for k in np.unique(first.fold):
            rows = first.fold == k
            if target[rows].min() < target[rows].max():
                values.append([_mean_over_seeds(target, plan, rows) for plan in (first, second)])
    return np.array(values).reshape(-1, 2)


def _mean_over_seeds(
    target: NDArray[np.integer], plan: PlanScores, rows: NDArray[np.bool_]
) -> float:
    # The seeds of a plan are no independent evidence on it: they have the same rows.
    scores = list(plan.seeds.values()) or [plan.blend]
    return float(np.mean([pauc(target[rows], score[rows]) for score in scores]))
