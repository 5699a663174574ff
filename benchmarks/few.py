"""`python -m benchmarks few`: scores if only some of a patient's lesions are known.

Random groups of a held-out patient's lesions are scored as if each were the whole patient, by
boosters that are fitted on whole patients, or on patients of which a share is split too.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from benchmarks.record import print_and_append
from benchmarks.settings import FewSettings
from infer.ensemble.blends.ranks import rank_among, to_scale_of
from infer.ensemble.boosting.out_of_fold import fit_boosters, score_held_out
from infer.ensemble.boosting.thinning import ThinnedTables
from infer.ensemble.boosting.training_table import TrainingTable
from infer.ensemble.features.spec import FeatureSpec
from infer.ensemble.lesions import describe_lesion_counts, has_few_lesions
from infer.ensemble.scoring.comparison import compare_scores
from infer.ensemble.scoring.few_lesions import ALL, split_by_lesions
from infer.ensemble.settings import FitSettings
from isic import schema
from isic.arrays import Floats
from isic.dataset import Dataset
from isic.features import relative_to_patient
from isic.folds import draw_folds
from isic.metadata import with_patient
from isic.metrics import pauc, roc_auc
from isic.runtime.config import build

SizeScores = dict[str, Floats]
"""[seeds, N] out-of-fold scores by the number of lesions scored together."""


@dataclass(frozen=True)
class Rows:
    """The rows of the dataset, sorted by id."""

    by_size: Mapping[str, pl.DataFrame]
    """Metadata by the number of lesions scored together; ALL has the patients as they are."""
    fold: NDArray[np.integer]
    """[N]."""

    @property
    def metadata(self) -> pl.DataFrame:
        return self.by_size[ALL]


def few(settings: FewSettings) -> None:
    """Run `benchmarks few`, which its settings describe."""
    metadata = with_patient(Dataset(settings.data).metadata("train")).sort(schema.ID)
    fold = draw_folds(metadata, settings.num_folds, settings.split_seed).of(metadata).to_numpy()
    groups = {str(size): table for size, table in split_by_lesions(metadata, settings.sizes)}
    rows = Rows({**groups, ALL: metadata}, fold)
    first: SizeScores = {}
    for features in settings.features:
        spec = FeatureSpec.parse(features.replace("+", ","))
        shares = settings.thin_shares if relative_to_patient(spec.tabular) else ()
        for share in (0.0, *shares):
            scores = _scores(spec, share, rows, settings)
            name = f"{features}, thinned in {share:g}" if share else features
            # Each feature set is compared with the first one on groups of the same size.
            first = first or scores
            _record(name, first, scores, rows, settings)
            if relative_to_patient(spec.tabular) and first is not scores:
                blended = _blend(first, scores, rows)
                name = f"{name}, blended with {settings.features[0]}"
                _record(name, first, blended, rows, settings)


def _scores(spec: FeatureSpec, share: float, rows: Rows, settings: FewSettings) -> SizeScores:
    """Fit boosters on patients of which a share is split. Return the scores of each size."""
    flags = {
        "data": settings.data,
        "seeds": settings.seeds,
        "num_threads": settings.num_threads,
        "thin_patients": share,
    }

    def frame(metadata: pl.DataFrame) -> pl.DataFrame:
        return spec.frame(metadata, ())

    def table_of(metadata: pl.DataFrame) -> TrainingTable:
        return TrainingTable(frame(metadata))

    thinned = ThinnedTables(rows.metadata, table_of, share) if share else None
    target = rows.metadata[schema.TARGET].to_numpy()
    fit_settings = build(FitSettings, flags)
    table = table_of(rows.metadata)
    bag = fit_boosters(table, spec.tabular, target, rows.fold, fit_settings, thinned)
    return {
        size: np.stack(list(score_held_out(bag, frame(metadata), rows.fold).values()))
        for size, metadata in rows.by_size.items()
    }


def _blend(first: SizeScores, second: SizeScores, rows: Rows) -> SizeScores:
    """Return the mean ranks of two sets of scores; the first's for patients of few lesions.

    The latter are on the scale of the mean ranks, as `Blend.score_of_single_lesions` has them.
    """
    training = describe_lesion_counts(rows.metadata)
    singles = {size: _ranks(first, size) for size in rows.by_size}
    means = {size: (ranks + _ranks(second, size)) / 2 for size, ranks in singles.items()}
    blended = {}
    for size, metadata in rows.by_size.items():
        by_seed = zip(singles[size], singles[ALL], means[ALL], strict=True)
        moved = np.stack([to_scale_of(*seed) for seed in by_seed])
        blended[size] = np.where(has_few_lesions(metadata, training), moved, means[size])
    return blended


def _ranks(scores: SizeScores, size: str) -> Floats:
    """Return [seeds, N] the scores' ranks among the same seed's scores of whole patients."""
    pairs = zip(scores[size], scores[ALL], strict=True)
    return np.stack([rank_among(score, reference) for score, reference in pairs])


def _record(
    name: str, first: SizeScores, second: SizeScores, rows: Rows, settings: FewSettings
) -> None:
    """Append a row for each number of lesions, compared with the first feature set."""
    target = rows.metadata[schema.TARGET].to_numpy()
    patient = rows.metadata[schema.PATIENT].to_numpy()
    for size, scores in second.items():
        compared = compare_scores(target, patient, first[size], scores, settings.draws)
        mean = scores.mean(axis=0)
        row = {
            "data": settings.label,
            "features": name,
            "lesions_together": size,
            "pauc": round(pauc(target, mean), 4),
            "auc": round(roc_auc(target, mean), 4),
            **compared.row(),
        }
        print_and_append("few", [row], settings.results)
