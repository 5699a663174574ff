"""Boosters fitted on every row: they score with one pass over the images, not one per fold.

They have no out-of-fold score: that of the ensemble is of the folds' boosters. The agreement of
both is measured on the rows of the first fold, with boosters that are fitted on the other rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.embedding.store import read_run
from infer.ensemble.artifact import Ensemble
from infer.ensemble.blends.artifact import Blend, Scorer, ensembles_of, needed_part
from infer.ensemble.blends.ranks import Scores, blend, rank_correlation
from infer.ensemble.boosting.libraries import LIBRARIES, booster_entries
from infer.ensemble.boosting.out_of_fold import (
    FitResult,
    fit_boosters,
    mean_of_folds,
    scores_by_fold,
)
from infer.ensemble.boosting.thinning import ThinnedTables
from infer.ensemble.boosting.training_table import TrainingTable
from infer.ensemble.images.networks import by_network
from infer.ensemble.images.scores import LogitScaler
from infer.ensemble.rows import FitRows
from infer.ensemble.settings import SOURCES, EmbeddingSources, FitSettings
from isic import schema
from isic.features import Encoding
from isic.folds import draw_folds
from isic.layout import ALL, ALL_NUMBER, EMBEDDINGS_DIR, Fold, find_embeddings
from isic.metrics import pauc
from isic.runtime.errors import UserError
from isic.runtime.machine import num_cores

Rows = Literal["folds", "all"]
ESTIMATES: Mapping[Rows, str] = {
    "folds": "out-of-fold scores are of the boosters and networks of the folds, each on the rows "
    "that it was fitted without; scores here are means over all of them",
    "all": "out-of-fold scores are of the boosters and networks of the folds, each on the rows "
    "that it was fitted without; those used here were fitted on every row and have no such score",
}
"""Manifests' sentence on the out-of-fold scores, by the models that score a table."""


@dataclass(frozen=True)
class Refit:
    """Boosters that were fitted on every row."""

    boosters: Mapping[tuple[str, Fold, int], str]
    """Text by library, ALL and seed; none if the image score is the only feature."""
    encoding: Encoding | None
    agreement: Mapping[str, Any] | None
    """See `measure_agreement`."""

    def manifest_field(self) -> dict[str, Any]:
        return {
            "boosters": booster_entries(self.boosters),
            "agreement": self.agreement,
            "out_of_fold_scores": ESTIMATES["all"],
        }


def refit_boosters(rows: FitRows) -> Refit:
    """Fit a booster per library and seed on every row, and measure their agreement with the folds'.

    The image score of a row is out of fold, as for the folds' boosters.
    """
    if not rows.names:
        return Refit({}, None, None)
    result = _fit_on_all(rows.table, rows.names, rows.target, rows.settings, rows.thinned)
    (encoding,) = result.encodings.values()
    boosters: dict[tuple[str, Fold, int], str] = {
        (library, ALL, seed): text for (library, _, seed), text in result.boosters.items()
    }
    agreement = measure_agreement(
        rows.table, rows.names, rows.metadata, rows.fold.to_numpy(), rows.settings
    )
    return Refit(boosters, encoding, agreement)


def _fit_on_all(
    table: TrainingTable,
    names: tuple[str, ...],
    target: NDArray[np.integer],
    settings: FitSettings,
    thinned: ThinnedTables | None = None,
) -> FitResult:
    # Each booster is fitted without the rows of a fold; no row is in this one.
    in_fold = np.zeros(len(target), np.int8)
    return fit_boosters(table, names, target, in_fold, settings, thinned, fold_ids=[1])


def measure_agreement(
    table: TrainingTable,
    names: tuple[str, ...],
    metadata: pl.DataFrame,
    fold: NDArray[np.integer],
    settings: FitSettings,
) -> dict[str, Any] | None:
    """Compare boosters of folds with one on all rows, on rows that neither has seen.

    Both are fitted, with one seed, on the rows outside the first fold, which are divided into as
    many folds again, and score the rows of the first fold.

    Args:
        metadata: `isic_id`, `target` and optionally `patient_id`, in the order of the table.
        fold: [N].

    Returns:
        `spearman` of both scores (None if one is constant), `pauc_folds`, `pauc_all`, and the
        numbers of rows; None if the rows cannot be divided or the first fold has one class, of
        which a line is printed.
    """
    fold_ids = np.unique(fold)
    is_fitted = fold != fold_ids[0]
    # Whole patients, as both ways are fitted on the same ones.
    one_seed = settings.model_copy(update={"seeds": 1, "thin_patients": 0.0})
    rows = metadata.filter(pl.Series(is_fitted))
    target = metadata.filter(pl.Series(~is_fitted))[schema.TARGET].to_numpy()
    try:
        # Before the boosters are fitted, as a fold plan from a file may have such a fold.
        if target.min() == target.max():
            raise UserError(f"all rows of fold {fold_ids[0]} have target {target[0]}")
        plan = draw_folds(rows, len(fold_ids), settings.seed_of_split)
    except UserError as error:
        print(f"note: the agreement of folds and all rows is not measured: {error}")
        return None
    inner_table = table.filter(is_fitted)
    inner_target = rows[schema.TARGET].to_numpy()
    inner_fold = plan.of(rows).to_numpy()
    results = (
        fit_boosters(inner_table, names, inner_target, inner_fold, one_seed),
        _fit_on_all(inner_table, names, inner_target, one_seed),
    )
    unseen = table.features.filter(pl.Series(~is_fitted))
    of_folds, of_all = (_score(result, unseen, one_seed) for result in results)
    return {
        "spearman": rank_correlation(of_folds, of_all),
        "pauc_folds": pauc(target, of_folds),
        "pauc_all": pauc(target, of_all),
        "num_fitted_rows": len(rows),
        "num_scored_rows": len(unseen),
    }


def _score(result: FitResult, table: pl.DataFrame, settings: FitSettings) -> Scores:
    """Return [N] the blend of the libraries, each the mean over its boosters of one seed."""
    by_fold = scores_by_fold(
        result.boosters,
        lambda key: LIBRARIES[key[0]].load(result.boosters[key]),
        result.encodings,
        table,
        settings.num_threads or num_cores(),
    )
    models = mean_of_folds(by_fold)
    # Ranked among each other: both sides have the same rows.
    return blend(models, settings.library_weights, models)


def describe_agreement(agreement: Mapping[str, Any]) -> str:
    """Return the result of `measure_agreement` as a line of text."""
    correlation = agreement["spearman"]
    return (
        f"on {agreement['num_scored_rows']:,} rows that neither was fitted on: "
        f"pAUC {agreement['pauc_folds']:.4f} by the boosters of folds, "
        f"{agreement['pauc_all']:.4f} by those on all rows, "
        f"rank correlation {'unknown' if correlation is None else f'{correlation:.4f}'}"
    )


def choose_rows(scorer: Scorer, rows: Rows, sources: EmbeddingSources) -> Scorer:
    """Return the ensemble, or the needed part of a blend, with the models that score a table.

    Args:
        rows: those that the models were fitted on: without a fold each, or all.

    Raises:
        UserError: the ensemble has no boosters on all rows, or the embeddings are not given or by
            other networks than these rows need.
    """
    scorer = needed_part(scorer)
    ensembles = ensembles_of(scorer)
    if rows == "all":
        for ensemble in ensembles:
            refuse_without_refit(ensemble)
    _refuse_other_flags(scorer, rows, sources)
    if any(ensemble.state.image.needs["embeddings"] for ensemble in ensembles):
        _refuse_other_networks(rows, sources)
    if rows == "folds":
        return scorer
    if isinstance(scorer, Blend):
        members = {name: refitted(member, sources) for name, member in scorer.members.items()}
        return replace(scorer, members=members)
    return refitted(scorer, sources)


def refuse_without_refit(ensemble: Ensemble) -> None:
    """Raise a UserError if an ensemble has no boosters on all rows."""
    if not ensemble.manifest.get("refit"):
        raise UserError(
            f"{ensemble.root} has no boosters on all rows; fit it again with --refit true, or "
            "leave --rows out"
        )


def _refuse_other_flags(scorer: Scorer, rows: Rows, sources: EmbeddingSources) -> None:
    """Raise a UserError if a flag lacks the embeddings that it needs, or has some in vain."""
    for flag in SOURCES:
        networks = {name for each in ensembles_of(scorer) for name in each.manifest[flag]}
        given = getattr(sources, flag)
        if given and not networks:
            raise UserError(f"{scorer.root} needs no --{flag} to score; leave --{flag} out")
        if networks and not given:
            # A frozen network is the same for all rows.
            fold: Fold | None = ALL if rows == "all" and flag == "embeddings" else None
            folders = [
                str(find_embeddings(EMBEDDINGS_DIR, name, fold)) for name in sorted(networks)
            ]
            raise UserError(f"{scorer.root} uses images; give --{flag} {','.join(folders)}")


def _refuse_other_networks(rows: Rows, sources: EmbeddingSources) -> None:
    """Raise a UserError if embeddings are by the folds for all rows, or by fold_all for folds."""
    for name, root in by_network(sources.embeddings, "test").items():
        by_all = read_run(root, "test").get("folds") == [ALL]
        if by_all and rows == "folds":
            raise UserError(
                f"{root} holds embeddings by the network of all rows; add --rows all, or give "
                "those by the folds"
            )
        if not by_all and rows == "all":
            raise UserError(
                f"--rows all needs embeddings by the network of all rows, and {root} holds those "
                f"by the folds; run `python -m infer embed --config {name} --fold {ALL}`"
            )


def refitted(ensemble: Ensemble, sources: EmbeddingSources) -> Ensemble:
    """Return the ensemble with its boosters on all rows, for images by the network of all rows."""
    state = ensemble.state
    image = state.image
    # By a number, as the encodings are.
    boosters = [{**entry, "fold": ALL_NUMBER} for entry in ensemble.manifest["refit"]["boosters"]]
    manifest = {**ensemble.manifest, "boosters": boosters}
    if image.networks:
        networks = {
            name: replace(network, scaler=mean_scaler(network.scaler) if network.scaler else None)
            for name, network in image.networks.items()
        }
        image = replace(image, networks=networks)
        manifest["embeddings"] = _with_checkpoints(manifest["embeddings"], sources)
    encodings = {ALL_NUMBER: state.refit} if state.refit else {}
    return replace(
        ensemble, manifest=manifest, state=replace(state, encodings=encodings, image=image)
    )


def _with_checkpoints(origins: Mapping[str, Any], sources: EmbeddingSources) -> dict[str, Any]:
    """Return the origins of the networks with the weights of the given embeddings.

    They are others than in the fit. All else must be as there.
    """
    roots = by_network(sources.embeddings, "test")
    return {
        name: {**origin, "checkpoints": read_run(roots[name], "test").get("checkpoints")}
        if name in roots
        else origin
        for name, origin in origins.items()
    }


def mean_scaler(scaler: LogitScaler) -> LogitScaler:
    """Return constants for the network of all rows, which has no out-of-fold logits of its own.

    They are the mean of the folds' means and the mean of their deviations.
    """
    mean, deviation = np.mean(list(scaler.folds.values()), axis=0).tolist()
    return LogitScaler({ALL_NUMBER: (mean, deviation)})
