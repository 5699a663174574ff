"""`python -m infer blend A B ...`: write a blend of fitted ensembles."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.embedding.store import origin_difference
from infer.ensemble.artifact import (
    ENSEMBLE_FILE,
    MEMBERS_DIR,
    SCORES_FILE,
    Ensemble,
    clear_ensemble,
    open_ensemble,
    refuse_foreign_folder,
    refuse_other_ensemble,
    write_calibration,
    write_ensemble_manifest,
)
from infer.ensemble.blends.artifact import Weights, blend_by_fold, mean_of_members, networks_of
from infer.ensemble.blends.ranks import Scores, rank_among
from infer.ensemble.boosting.splits import (
    Plans,
    PlanScores,
    read_plans,
    split_seeds,
    summarise_plans,
    write_plans,
)
from infer.ensemble.scoring.calibration import (
    CALIBRATION,
    fit_calibration,
    summarise_out_of_fold,
)
from infer.ensemble.scoring.chosen import CHOSEN_KEY, choice_notes, choices_of_blend
from infer.ensemble.scoring.compare import same_rows
from infer.ensemble.scoring.scores import format_scores, summarise
from infer.ensemble.scoring.training_rows import patients_of
from infer.ensemble.scoring.triage import TRIAGE, summarise_triage
from infer.ensemble.settings import BlendSettings
from isic import schema
from isic.dataset import Dataset, refuse_dataset
from isic.layout import FOLDS_FILE, OOF_FILE
from isic.metrics import pauc
from isic.runtime.errors import UserError
from isic.runtime.files import copy_file, sha256, versions, write_json
from isic.runtime.only_writer import only_writer
from isic.tables import write_parquet

NUM_STEPS = 20
"""Additions of a member in the search, so that weights are multiples of 1/20 or coarser."""

TAKEN_NAMES = (schema.ID, schema.TARGET, "fold", "blend", "std", "probability")
"""Columns of the tables of scores, which no member may be named after."""


def write_blend(settings: BlendSettings) -> Path:
    """Blend ensembles, write the blend and print its out-of-fold scores. Return its folder.

    Raises:
        UserError: the ensembles differ in rows or folds, share a name, are blends, or are in the
            folder of the blend.
    """
    members = open_members(settings.ensembles)
    root = settings.output_dir / settings.name
    with only_writer(root):
        return _blend_into(root, members, settings)


def _blend_into(root: Path, members: Mapping[str, Ensemble], settings: BlendSettings) -> Path:
    refuse_dataset(root, "--output_dir or --name")
    refuse_foreign_folder(root)
    _refuse_own_members(root, members)
    inputs = _manifest_inputs(members, settings)
    if not settings.force:
        refuse_other_ensemble(root, inputs)
    rows, scores = _read_scores(members)
    target = rows[schema.TARGET].to_numpy()
    fold = rows["fold"].to_numpy()
    weights, by_fold = choose_weights(settings.weights, scores, target, fold)
    blended = blend_by_fold(scores, by_fold, fold)
    plans = blend_plans(members, settings.weights, target, fold, by_fold)
    manifests = [member.manifest for member in members.values()]
    searched = settings.weights == "search" and not _are_equal(by_fold)
    chosen = {CHOSEN_KEY: choices_of_blend(searched, manifests)}
    oof = rows.with_columns(**scores, blend=blended)
    dataset = Dataset(settings.data)
    training = dataset.metadata("train")
    patient = patients_of(list(members.values()), rows, dataset, training).to_numpy()
    columns = {**scores, "blend": blended}
    summaries = {key: summarise(target, value, fold, patient) for key, value in columns.items()}
    summaries["blend"] |= summarise_plans(plans, target)
    summaries["blend"][TRIAGE] = summarise_triage(target, blended, patient)
    calibration = None
    if settings.calibrate:
        before = mean_of_members(members, weights)
        summaries["blend"][CALIBRATION] = summarise_out_of_fold(settings.calibrate, before, oof)
        calibration = fit_calibration(settings.calibrate, blended, target)
    clear_ensemble(root)
    files = _write_files(root, members, oof, summaries)
    files += write_plans(root, rows[schema.ID], plans)
    files += write_calibration(root, calibration)
    results = {
        "weights": weights,
        "weights_by_fold": {str(k): of_fold for k, of_fold in by_fold.items()},
        "scores": summaries["blend"],
        "versions": versions("isic-toolkit", "numpy", "polars"),
    }
    write_ensemble_manifest(root, files, {**inputs, **results, **chosen})
    print("weights: " + ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items()))
    print(format_scores(summaries))
    for note in [
        *_notes_on_weights(members, weights),
        *_notes_on_members(members, plans),
        *choice_notes(root.name, chosen),
    ]:
        print(note)
    print(f"ensemble: {root}")
    return root


def open_members(paths: Sequence[Path]) -> dict[str, Ensemble]:
    """Return the ensembles by the names of their folders.

    Raises:
        UserError: two folders have the same name, one of them holds a blend, or their tables of
            own columns or networks of one name differ.
    """
    members: dict[str, Ensemble] = {}
    for path in paths:
        ensemble = open_ensemble(path)
        name = ensemble.root.resolve().name
        if name in {*members, *TAKEN_NAMES}:
            raise UserError(
                f"{ensemble.root}: each ensemble of a blend needs a name of its own; rename the "
                "folder"
            )
        _refuse_other_tables(members, ensemble)
        _refuse_other_networks(members, ensemble)
        members[name] = ensemble
    return members


def _refuse_other_tables(members: Mapping[str, Ensemble], ensemble: Ensemble) -> None:
    """Raise a UserError if a table of own columns has other columns than a member's."""
    for other in members.values():
        for name, table in ensemble.own_tables.items():
            if other.own_tables.get(name, table) != table:
                raise UserError(
                    f"{other.root} and {ensemble.root} were fitted with different tables called "
                    f"{name}; rename one of the files and fit again"
                )


def _refuse_other_networks(members: Mapping[str, Ensemble], ensemble: Ensemble) -> None:
    """Raise a UserError if no embeddings of a network fit both an ensemble and a member."""
    for other in members.values():
        for (flag, name), origin in _origins(ensemble).items():
            difference = origin_difference(_origins(other).get((flag, name), origin), origin)
            if difference:
                raise UserError(
                    f"{ensemble.root} was fitted with {difference} of {name} than {other.root}, so "
                    f"no --{flag} fits both; fit them with the same embeddings, or train the "
                    "networks under names of their own (--name)"
                )


def _origins(ensemble: Ensemble) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return the ORIGIN_KEYS of an ensemble's networks by field of the manifest and name."""
    manifest = ensemble.manifest
    frozen = {name: model["made_with"] for name, model in manifest["frozen"].items()}
    return {
        (flag, name): origin
        for flag, origins in (("embeddings", manifest["embeddings"]), ("frozen", frozen))
        for name, origin in origins.items()
    }


def _refuse_own_members(root: Path, members: Mapping[str, Ensemble]) -> None:
    """Raise a UserError if the blend's folder is cleared before a member in it can be copied."""
    folder = root.resolve()
    for member in members.values():
        place = member.root.resolve()
        if place == folder or folder / MEMBERS_DIR in place.parents:
            raise UserError(
                f"{root} would replace {member.root}, which is part of the blend; choose another "
                "--name"
            )


def _read_scores(members: Mapping[str, Ensemble]) -> tuple[pl.DataFrame, dict[str, Scores]]:
    """Return `isic_id`, `fold`, `target`, and [N] the out-of-fold scores by member."""
    tables = same_rows(list(members.values()))
    rows = tables[0].select(schema.ID, "fold", schema.TARGET)
    blends = [table["blend"].to_numpy() for table in tables]
    return rows, dict(zip(members, blends, strict=True))


def blend_plans(
    members: Mapping[str, Ensemble],
    wanted: str | Sequence[float],
    target: NDArray[np.integer],
    fold: NDArray[np.integer],
    by_fold: Mapping[int, Weights],
) -> Plans:
    """Return the scores of the blend in each fold plan that all members have; none if in one only.

    Weights are searched again in each plan: those of another plan have met the held-out labels.

    Args:
        wanted: as for `choose_weights`.
        target, fold: [N], in the order of the ids; the folds are those of the first plan.
        by_fold: the weights that were chosen for the first plan.
    """
    shared = set.intersection(*(set(split_seeds(member.manifest)) for member in members.values()))
    if len(shared) < 2:
        return {}
    by_member = {name: read_plans(member.root) for name, member in members.items()}
    blended = {}
    for split_seed in sorted(shared):
        plans = {name: of[split_seed] for name, of in by_member.items()}
        other = next(iter(plans.values())).fold
        weights = by_fold
        if not np.array_equal(other, fold):
            scores = {name: plan.blend for name, plan in plans.items()}
            label = f"split seed {split_seed}: "
            _, weights = choose_weights(wanted, scores, target, other, label)
        blended[split_seed] = _blend_plan(plans, weights)
    return blended


def _blend_plan(members: Mapping[str, PlanScores], by_fold: Mapping[int, Weights]) -> PlanScores:
    fold = next(iter(members.values())).fold
    scores = {name: plan.blend for name, plan in members.items()}
    seeds = {
        seed: blend_by_fold(
            {name: plan.seeds[seed] for name, plan in members.items()}, by_fold, fold
        )
        for seed in sorted(set.intersection(*(set(plan.seeds) for plan in members.values())))
    }
    return PlanScores(fold, seeds, blend_by_fold(scores, by_fold, fold))


def choose_weights(
    wanted: str | Sequence[float],
    scores: Mapping[str, Scores],
    target: NDArray[np.integer],
    fold: NDArray[np.integer],
    label: str = "",
) -> tuple[Weights, dict[int, Weights]]:
    """Return the weights of the members, and those of each held-out fold's rows.

    Args:
        wanted: a number per member, `equal`, or `search`.
        scores: [N] out-of-fold scores by member.
        target, fold: [N].
        label: start of the line that is printed about a search.
    """
    folds: list[int] = np.unique(fold).tolist()
    numbers = [1.0] * len(scores) if isinstance(wanted, str) else wanted
    given = {name: number / sum(numbers) for name, number in zip(scores, numbers, strict=True)}
    same: dict[int, Weights] = dict.fromkeys(folds, given)
    if wanted != "search":
        return given, same
    ranks = {name: rank_among(score, score) for name, score in scores.items()}
    nested: dict[int, Weights] = {k: search_weights(ranks, target, fold != k) for k in folds}
    found = pauc(target, blend_by_fold(scores, nested, fold))
    equal = pauc(target, blend_by_fold(scores, same, fold))
    is_better = found > equal
    print(
        f"{label}search: pAUC {found:.4f} with each fold's weights chosen on the other folds, "
        f"{equal:.4f} with equal weights: {'accepted' if is_better else 'equal weights are kept'}"
    )
    if not is_better:
        return given, same
    return search_weights(ranks, target, np.ones(len(fold), bool)), nested


def _are_equal(by_fold: Mapping[int, Weights]) -> bool:
    """Return whether all members weigh the same, as they do after a search that is rejected."""
    return all(len(set(weights.values())) == 1 for weights in by_fold.values())


def search_weights(
    ranks: Mapping[str, Scores], target: NDArray[np.integer], rows: NDArray[np.bool_]
) -> Weights:
    """Return weights with a high pAUC on some rows, by ensemble selection with replacement.

    Caruana et al. 2004, "Ensemble selection from libraries of models": the member that helps most
    is added again and again, and the best of these mixtures is returned.

    Args:
        ranks: [N] by member.
        target: [N].
        rows: [N] whether to use a row.
    """
    chosen: list[str] = []
    total = np.zeros(int(rows.sum()))
    values = []
    for _ in range(NUM_STEPS):
        after = {name: pauc(target[rows], total + rank[rows]) for name, rank in ranks.items()}
        best = max(after, key=lambda name: after[name])
        chosen.append(best)
        total += ranks[best][rows]
        values.append(after[best])
    mixture = chosen[: int(np.argmax(values)) + 1]
    return {name: mixture.count(name) / len(mixture) for name in ranks}


def _notes_on_weights(members: Mapping[str, Ensemble], weights: Weights) -> list[str]:
    """Return a line on networks that only members without a weight use."""
    used: set[str] = set()
    idle: set[str] = set()
    for name, member in members.items():
        (used if weights[name] else idle).update(networks_of(member))
    left = ", ".join(sorted(idle - used))
    if not left:
        return []
    return [f"note: only members without a weight use {left}; give no embeddings of it"]


def _notes_on_members(members: Mapping[str, Ensemble], plans: Plans) -> list[str]:
    """Return lines on fold plans and seeds that only some of the members have."""
    notes = []
    num_plans = {name: len(split_seeds(member.manifest)) or 1 for name, member in members.items()}
    if any(number > max(len(plans), 1) for number in num_plans.values()):
        notes.append(
            f"note: the members have different fold plans ({_listed(num_plans)}), and the blend "
            "has only those of all; fit them with equal --splits"
        )
    num_seeds = {name: len(member.scores_by_seed()) for name, member in members.items()}
    boosted = {name: number for name, number in num_seeds.items() if number}
    if len(set(boosted.values())) > 1:
        notes.append(
            f"note: the members have different numbers of seeds ({_listed(boosted)}); a comparison "
            "tests the blend by the seeds of all"
        )
    return notes


def _listed(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


def _manifest_inputs(members: Mapping[str, Ensemble], settings: BlendSettings) -> dict[str, Any]:
    """Return the manifest fields that determine a blend."""
    first = next(iter(members.values())).manifest
    shared = ("folds_digest", "metadata_sha256", "lesions_per_patient")
    return {
        "members": {name: sha256(member.root / ENSEMBLE_FILE) for name, member in members.items()},
        "weights_from": settings.weights,
        "calibrate": settings.calibrate,
        **{key: first[key] for key in shared},
    }


def _write_files(
    root: Path, members: Mapping[str, Ensemble], oof: pl.DataFrame, summaries: dict[str, Any]
) -> list[str]:
    """Write all files but the manifest. Return the names of those that it has a digest of."""
    for name, member in members.items():
        copy_ensemble(member, root / MEMBERS_DIR / name)
    folds = next(iter(members.values())).root / FOLDS_FILE
    copy_file(folds, root / FOLDS_FILE)
    write_parquet(root / OOF_FILE, oof)
    write_json(root / SCORES_FILE, summaries)
    manifests = [f"{MEMBERS_DIR}/{name}/{ENSEMBLE_FILE}" for name in members]
    return [*manifests, FOLDS_FILE, OOF_FILE, SCORES_FILE]


def copy_ensemble(ensemble: Ensemble, folder: Path) -> None:
    """Copy the files of an ensemble, without its report."""
    for name in (*ensemble.manifest["files"], ENSEMBLE_FILE):
        copy_file(ensemble.root / name, folder / name)
