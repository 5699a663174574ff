"""`python -m benchmarks ablation`: scores of groups of features with each booster library."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.record import Row, print_and_append
from benchmarks.settings import AblationSettings
from infer.ensemble.artifact import Ensemble, open_ensemble
from infer.ensemble.fit import fit_ensemble
from infer.ensemble.scoring.compare import compare_sides, pauc_by_seed
from infer.ensemble.settings import FitSettings
from isic.runtime.config import build

TABULAR_SETS = (
    "raw",
    "numeric",
    "raw+formula",
    "raw+patient_z",
    "raw+patient_rank+patient_extreme",
    "engineered",
    "extended",
)
IMAGE_SETS = ("image", "raw+image", "multimodal", "engineered+aligned", "multimodal+aligned")


def ablation(settings: AblationSettings) -> None:
    """Run `benchmarks ablation`, which its settings describe."""
    sets = settings.features or (*TABULAR_SETS, *(IMAGE_SETS if settings.embeddings else ()))
    for libraries in settings.libraries:
        for row in _compare_sets(settings, sets, libraries):
            print_and_append("ablation", [row], settings.results)


def _compare_sets(
    settings: AblationSettings, sets: tuple[str, ...], libraries: str
) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = _fitted(settings, sets[0], libraries, folder)
        for features in sets:
            ensemble = first
            if features != sets[0]:
                ensemble = _fitted(settings, features, libraries, folder)
            yield {
                "data": settings.label,
                "features": features,
                "model": libraries,
                **compare_with_first(first, ensemble, settings.data, settings.draws),
            }


def _fitted(settings: AblationSettings, features: str, libraries: str, folder: Path) -> Ensemble:
    flags = {
        "data": settings.data,
        "embeddings": settings.embeddings,
        "frozen": settings.frozen,
        "features": features.replace("+", ","),
        "libraries": tuple(libraries.split("+")),
        "seeds": settings.seeds,
        "split_seed": settings.split_seed,
        "splits": settings.splits,
        "num_rounds": settings.num_rounds,
        "output_dir": folder,
        "name": features,
    }
    # Its own table of scores would hide the rows of this one.
    with contextlib.redirect_stdout(io.StringIO()):
        fit_ensemble(build(FitSettings, flags))
    return open_ensemble(folder / features)


def compare_with_first(first: Ensemble, ensemble: Ensemble, data: Path, num_draws: int) -> Row:
    """Return an ensemble's out-of-fold scores, and its comparison with the first one."""
    scores = ensemble.manifest["scores"]
    by_seed = list(pauc_by_seed(ensemble).values())
    return {
        "num_features": len(ensemble.state.names) or 1,
        "rows": len(ensemble.oof()),
        "pauc": round(scores["pauc"], 4),
        "auc": round(scores["auc"], 4),
        "pauc_mean_of_seeds": round(float(np.mean(by_seed)), 4) if by_seed else None,
        **compare_sides([first], [ensemble], data, num_draws).row(),
    }
