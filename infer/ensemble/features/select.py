"""`python -m infer select`: choose features by the gain of boosters, nested in the folds.

A fold's list comes from boosters that are fitted on the rows outside the fold, so the fold's rows
test it: the out-of-fold scores of boosters on each fold's own list are the estimate of what the
rule brings. The list that is written is for the same rule on all rows: features that are in most
folds' lists. It has seen every row, so an ensemble that is fitted on it has a slightly optimistic
score on these rows.

Null importance: Altmann et al. 2010, Permutation importance: a corrected feature importance
measure.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.ensemble.artifact import refuse_other_fields
from infer.ensemble.blends.ranks import blend, model_name
from infer.ensemble.boosting.libraries import LIBRARIES
from infer.ensemble.boosting.out_of_fold import FitResult, fit_boosters, fit_outside, num_at_once
from infer.ensemble.boosting.training_table import TrainingTable
from infer.ensemble.features.spec import FeatureSpec
from infer.ensemble.features.words import MINUS, label
from infer.ensemble.fit import model_settings, own_inputs
from infer.ensemble.images.features import embedding_origins
from infer.ensemble.rows import read_rows, refuse_unknown_blanks, warn_of_own_columns
from infer.ensemble.scoring.chosen import selected_on
from infer.ensemble.scoring.comparison import Comparison, compare_scores
from infer.ensemble.settings import SelectSettings
from isic import schema
from isic.dataset import Dataset
from isic.features import fit_encoding
from isic.metadata import with_patient
from isic.runtime.errors import UserError
from isic.runtime.files import (
    holds,
    manifest_path,
    read_json,
    refuse_foreign,
    sha256,
    versions,
    write_manifest,
    write_text,
)
from isic.runtime.progress import TimeLeft

NULL_STREAM = 3
"""Added to the seed of shuffled targets, see `out_of_fold`."""
NULL_PERCENTILE = 75
"""The percentile of the gains on shuffled targets that a feature's gain must exceed."""
GAIN_KEPT = 0.95
"""Share of all gain that the features chosen by gain hold."""
DRAWS = 1000
"""Bootstrap samples of the patients."""


@dataclass(frozen=True)
class Rows:
    """The training rows of a selection."""

    spec: FeatureSpec
    metadata: pl.DataFrame
    num_folds: int
    table: TrainingTable
    names: tuple[str, ...]
    """Columns of the boosters' matrix: the candidates, then the image features."""
    origins: Mapping[str, Any]
    """Fields of the manifest."""
    target: NDArray[np.integer]
    """[N], 0 or 1."""
    fold: NDArray[np.integer]
    """[N]."""

    def outside(self, k: int) -> "Rows":
        """Return the rows outside a fold."""
        is_outside = self.fold != k
        return replace(
            self,
            metadata=self.metadata.filter(pl.Series(is_outside)),
            table=self.table.filter(is_outside),
            target=self.target[is_outside],
            fold=self.fold[is_outside],
        )


@dataclass(frozen=True)
class Choice:
    """The features of one fold's list."""

    score: NDArray[np.float64]
    """[D] by candidate, higher for a better feature."""
    kept: NDArray[np.bool_]
    """[D] whether a candidate is in the list."""


def select(settings: SelectSettings) -> None:
    """Run `infer select`, which its settings describe."""
    path = list_path(settings)
    is_own = holds(manifest_path(path), "artifact", "by", "nested")
    refuse_foreign([path, manifest_path(path)], is_own, "--output or --name")
    rows = _read(settings)
    candidates = rows.spec.table_names
    inputs = _manifest_inputs(rows, settings)
    if is_own and not settings.force:
        held = read_json(manifest_path(path))
        refuse_other_fields(held, inputs, f"{path} holds a list", "--output or --name")
    print(
        f"choosing among {len(candidates)} features by {settings.by}: {len(rows.target):,} rows, "
        f"{rows.num_folds} folds",
        flush=True,
    )
    choices = choose_by_fold(rows, settings)
    ranks = median_ranks(list(choices.values()))
    chosen = final_list(candidates, choices, ranks, settings.num_features)
    images = rows.names[len(candidates) :]
    lists = {k: _names(candidates, choice.kept) for k, choice in choices.items()}
    compared, nested = _judge(rows, {k: (*part, *images) for k, part in lists.items()}, settings)
    write_text(path, _text(chosen, rows, settings))
    write_manifest(
        path,
        **inputs,
        chosen=chosen,
        by_fold={str(k): part for k, part in lists.items()},
        median_rank={name: float(ranks[candidates.index(name)]) for name in chosen},
        nested=nested,
        versions=versions("isic-toolkit", *_packages(settings), "numpy", "polars"),
    )
    _print(compared, nested, len(candidates), lists)
    print(f"list: {path} ({len(chosen)} features); use it by --features @{path}")


def list_path(settings: SelectSettings) -> Path:
    """Return the file of the list."""
    name = settings.name or f"{label(settings.features)}_{settings.by}"
    return settings.output or settings.output_dir / f"{name}.txt"


def _manifest_inputs(rows: Rows, settings: SelectSettings) -> dict[str, Any]:
    """Return the fields of the manifest that determine a list."""
    return {
        "by": settings.by,
        "repeats": settings.repeats,
        "num_features": settings.num_features,
        **rows.origins,
    }


def _packages(settings: SelectSettings) -> list[str]:
    return [LIBRARIES[library].package for library in settings.libraries]


def _read(settings: SelectSettings) -> Rows:
    """Read the table that `infer fit` would fit, and check the libraries. Raise UserError."""
    rows = read_rows(settings)
    spec, metadata = rows.spec, rows.metadata
    if not spec.table_names:
        raise UserError(f'"{settings.features}" has no features to choose among; add a set')
    if settings.num_features and settings.num_features > len(spec.table_names):
        raise UserError(
            f"--num_features {settings.num_features} are more than the {len(spec.table_names)} "
            f"features of {settings.features}; give a smaller number, or leave it out"
        )
    table = rows.table
    refuse_unknown_blanks(settings.blank, table.features.select(rows.names))
    warn_of_own_columns(spec, table.features, metadata)
    parameters = {library: settings.parameters(library) for library in settings.libraries}
    origins = {
        "features": settings.features,
        "parameters": parameters,
        "settings": model_settings(settings),
        "folds_digest": rows.folds.digest,
        **embedding_origins(rows.image, settings.sources, "train"),
        **own_inputs(spec, rows.own_tables),
        "metadata_sha256": sha256(Dataset(settings.data).metadata_path("train")),
    }
    fold = rows.fold.to_numpy()
    return Rows(spec, metadata, rows.folds.num_folds, table, rows.names, origins, rows.target, fold)


def choose_by_fold(rows: Rows, settings: SelectSettings) -> dict[int, Choice]:
    """Return each fold's list, chosen on the rows outside the fold."""
    num_candidates = len(rows.spec.table_names)
    time_left = TimeLeft(rows.num_folds, "choosing")
    choices = {}
    for k in range(rows.num_folds):
        # The fold's own rows are not even in these tables.
        gains = _gains(rows.outside(k), k, settings)
        choices[k] = _choose(gains, num_candidates, settings)
        time_left.advance()
    return choices


Gains = dict[str, NDArray[np.float64]]
"""[repeats, D] gains by library."""


def _gains(rows: Rows, k: int, settings: SelectSettings) -> tuple[Gains, Gains]:
    """Return the gains of boosters on the rows, and those on shuffled targets, if needed.

    Args:
        rows: those outside fold `k`.
    """
    encoding = fit_encoding(rows.table.features, rows.names)

    def fit_one(key: tuple[str, int, bool]) -> NDArray[np.float64]:
        library, seed, is_shuffled = key
        labels = rows.target
        if is_shuffled:
            labels = np.random.default_rng((seed, k, NULL_STREAM)).permutation(labels)
        text = fit_outside((library, k, seed), rows.table, labels, rows.fold, encoding, settings)
        return LIBRARIES[library].gains(text, len(rows.names))

    by_gain = settings.by == "gain"
    num_real = settings.repeats if by_gain else settings.seeds
    num_shuffled = 0 if by_gain else settings.repeats
    first = settings.seed
    keys = [
        *((name, first + i, False) for name in settings.libraries for i in range(num_real)),
        *((name, first + i, True) for name in settings.libraries for i in range(num_shuffled)),
    ]
    with ThreadPoolExecutor(num_at_once(settings)) as pool:
        found = list(pool.map(fit_one, keys))
    real: dict[str, list[NDArray[np.float64]]] = {name: [] for name in settings.libraries}
    shuffled: dict[str, list[NDArray[np.float64]]] = {name: [] for name in settings.libraries}
    for (library, _, is_shuffled), gains in zip(keys, found, strict=True):
        (shuffled if is_shuffled else real)[library].append(gains)
    stacked = {name: np.stack(parts) for name, parts in shuffled.items() if parts}
    return {name: np.stack(parts) for name, parts in real.items()}, stacked


def _choose(gains: tuple[Gains, Gains], num_candidates: int, settings: SelectSettings) -> Choice:
    """Return the list of a fold; every library counts equally."""
    real, shuffled = gains
    scores = []
    for library, parts in real.items():
        mean = parts.mean(axis=0)
        expected = np.percentile(shuffled[library], NULL_PERCENTILE, axis=0) if shuffled else 0.0
        scores.append((mean - expected) / max(mean.sum(), np.finfo(float).tiny))
    score = np.mean(scores, axis=0)[:num_candidates]
    return Choice(score, _kept(score, settings))


def _kept(score: NDArray[np.float64], settings: SelectSettings) -> NDArray[np.bool_]:
    """Return [D] whether a candidate is kept; at least one is."""
    order = np.argsort(-score, kind="stable")
    if settings.num_features:
        number = settings.num_features
    elif settings.by == "gain":
        held = np.cumsum(score[order]) / max(score.sum(), np.finfo(float).tiny)
        number = int(np.searchsorted(held, GAIN_KEPT)) + 1
    else:
        number = int((score > 0).sum())
    kept = np.zeros(len(score), dtype=bool)
    kept[order[: max(number, 1)]] = True
    return kept


def median_ranks(choices: Sequence[Choice]) -> NDArray[np.float64]:
    """Return [D] the median over folds of each candidate's rank, 0 for the best."""
    ranks = [np.argsort(np.argsort(-choice.score, kind="stable")) for choice in choices]
    return np.asarray(np.median(ranks, axis=0))


def final_list(
    candidates: Sequence[str],
    choices: Mapping[int, Choice],
    ranks: NDArray[np.float64],
    number: int | None,
) -> list[str]:
    """Return the features by median rank: those of most folds' lists, or the first `number`."""
    order = sorted(range(len(candidates)), key=lambda index: (ranks[index], candidates[index]))
    if number:
        return [candidates[index] for index in order[:number]]
    in_folds = np.sum([choice.kept for choice in choices.values()], axis=0)
    chosen = [candidates[i] for i in order if in_folds[i] > len(choices) / 2]
    return chosen or [candidates[order[0]]]


def _names(candidates: Sequence[str], kept: NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(name for name, is_kept in zip(candidates, kept, strict=True) if is_kept)


def _judge(
    rows: Rows, lists: Mapping[int, tuple[str, ...]], settings: SelectSettings
) -> tuple[Comparison, dict[str, Any]]:
    """Compare all features with each fold's own list, both out of fold."""
    first, second = (
        _by_seed(fit_boosters(rows.table, names, rows.target, rows.fold, settings), settings)
        for names in (rows.names, lists)
    )
    patient = with_patient(rows.metadata)[schema.PATIENT].to_numpy()
    found = compare_scores(rows.target, patient, first, second, DRAWS)
    all_features, by_fold = found.fits.mean(axis=0)
    return found, {"pauc_all": all_features, "pauc_by_fold_lists": by_fold, **found.row()}


def _by_seed(result: FitResult, settings: SelectSettings) -> NDArray[np.float64]:
    """Return [seeds, N] the blend of the libraries by seed."""
    weights = settings.library_weights
    seeds = range(settings.seed, settings.seed + settings.seeds)
    models = [
        {name: result.scores[name] for name in (model_name(each, seed) for each in weights)}
        for seed in seeds
    ]
    return np.stack([blend(part, weights, part) for part in models])


def _text(chosen: Sequence[str], rows: Rows, settings: SelectSettings) -> str:
    """Return the content of the list, which `--features @file` reads."""
    head = [
        f"# {len(chosen)} of {len(rows.spec.table_names)} features of {settings.features}, "
        f"by {settings.by}, the best first",
        # Lists are copied and renamed without their manifest.
        f"# {selected_on(rows.metadata)}",
    ]
    images = [f"{word}  # always kept" for word in rows.spec.forms]
    without = [f"{MINUS}{word}" for word in rows.spec.without_columns]
    return "\n".join([*head, *chosen, *images, *without]) + "\n"


def _print(
    compared: Comparison,
    nested: Mapping[str, Any],
    num_candidates: int,
    lists: Mapping[int, Sequence[str]],
) -> None:
    sizes = ", ".join(str(len(part)) for part in lists.values())
    low, _, high = compared.interval
    print(f"chosen outside each fold: {sizes} features")
    print(f"pAUC out of fold: {nested['pauc_all']:.4f} with all {num_candidates} features")
    print(f"pAUC out of fold: {nested['pauc_by_fold_lists']:.4f} with each fold's own list")
    print(
        f"difference {compared.difference:+.4f}, 95 % of patient samples between {low:+.4f} and "
        f"{high:+.4f}: {compared.verdict}"
    )
