"""`python -m benchmarks few`: scores if only some of a patient's lesions are known.

Random groups of a held-out patient's lesions are scored as if each were the whole patient. Boosters
are fitted on whole patients.
"""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from benchmarks.record import print_and_append
from benchmarks.settings import FewSettings
from infer.ensemble.boosters import LIBRARIES
from infer.ensemble.comparison import compare_scores
from infer.ensemble.feature_spec import FeatureSpec
from infer.ensemble.out_of_fold import FitResult, fit_boosters
from infer.ensemble.settings import FitSettings
from isic import schema
from isic.dataset import Dataset
from isic.folds import draw_folds
from isic.metadata import with_patient
from isic.metrics import pauc, roc_auc
from isic.runtime.config import build


def few(settings: FewSettings) -> None:
    """Run `benchmarks few`, which its settings describe."""
    metadata = with_patient(Dataset(settings.data).metadata("train")).sort(schema.ID)
    fold = draw_folds(metadata, settings.num_folds, settings.split_seed).of(metadata).to_numpy()
    target = metadata[schema.TARGET].to_numpy()
    patient = metadata[schema.PATIENT].to_numpy()
    tables = {str(size): split_patients(metadata, size) for size in settings.sizes}
    tables["all"] = metadata
    first: dict[str, NDArray[np.float64]] = {}
    for features in settings.features:
        spec = FeatureSpec.parse(features.replace("+", ","))
        flags = {
            "data": settings.data,
            "seeds": settings.seeds,
            "num_threads": settings.num_threads,
        }
        fit_settings = build(FitSettings, flags)
        bag = fit_boosters(spec.frame(metadata, ()), spec.tabular, target, fold, fit_settings)
        for size, table in tables.items():
            scores = held_out_scores(bag, spec.frame(table, ()), fold)
            # Each feature set is compared with the first one on groups of the same size.
            first.setdefault(size, scores)
            compared = compare_scores(target, patient, first[size], scores, settings.draws)
            mean = scores.mean(axis=0)
            row = {
                "data": settings.label,
                "features": features,
                "lesions_together": size,
                "pauc": round(pauc(target, mean), 4),
                "auc": round(roc_auc(target, mean), 4),
                **compared.row(),
            }
            print_and_append("few", [row], settings.results)


def split_patients(metadata: pl.DataFrame, size: int, seed: int = 0) -> pl.DataFrame:
    """Return the table with each patient replaced by groups of at most `size` of its lesions."""
    shuffled = metadata.sort(schema.ID).sample(fraction=1, shuffle=True, seed=seed)
    group = pl.int_range(pl.len()).over(schema.PATIENT) // size
    named = pl.format("{} group {}", schema.PATIENT, group).alias(schema.PATIENT)
    return shuffled.with_columns(named).sort(schema.ID)


def held_out_scores(
    bag: FitResult, table: pl.DataFrame, fold: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Return the scores [seeds, N] of a feature table's rows by the boosters of their own fold."""
    matrices = {
        k: encoding.transform(table.filter(fold == k)) for k, encoding in bag.encodings.items()
    }
    seeds = list(dict.fromkeys(seed for _, _, seed in bag.boosters))
    scores = np.zeros((len(bag.scores), len(table)))
    for (library, k, seed), text in bag.boosters.items():
        predict = LIBRARIES[library].load(text)
        scores[seeds.index(seed), fold == k] = predict(matrices[k], 1)
    return scores
