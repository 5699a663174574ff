"""`python -m benchmarks ablation`: what each group of features brings, with each library of boosters."""

import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np
from pydantic import Field

from benchmarks.record import Row, append
from infer.ensemble.artifact import Ensemble, open_ensemble
from infer.ensemble.boosters import LIBRARIES
from infer.ensemble.compare import compare_sides, pauc_by_seed
from infer.ensemble.fit import fit_ensemble
from infer.ensemble.fit_settings import FitSettings
from isic.runtime.config import Settings, Several, build

ALL = "+".join(LIBRARIES)
TABULAR = (
    "raw",
    "numeric",
    "raw+formula",
    "raw+patient_z",
    "raw+patient_rank+patient_extreme",
    "engineered",
    "extended",
)
IMAGES = ("image", "raw+image", "multimodal", "engineered+aligned", "multimodal+aligned")
SHARED = ("data", "embeddings", "frozen", "seeds", "split_seed", "num_rounds")
"""Settings that go to every fit as they are."""


class AblationSettings(Settings):
    """What `python -m benchmarks ablation` takes."""

    data: Path = Field(description="dataset folder; its training rows are scored out of fold")
    label: str = Field(description="what the data is, in a few words, for the table")
    embeddings: Path | None = Field(
        None, description="outputs/embeddings/<config>, made with --folds all"
    )
    frozen: Path | None = Field(None, description="embeddings by a model trained on other images")
    features: Several[str] = Field(
        (),
        description="feature sets, commas between them and + within; the first is what the others are compared with",
    )
    libraries: Several[str] = Field(
        (*LIBRARIES, ALL), description="libraries, or several with + between them"
    )
    seeds: int = Field(10, ge=2, description="seeds of every fit")
    split_seed: int | None = Field(
        None, ge=0, description="seed of the folds, when no plan comes with the data or embeddings"
    )
    num_rounds: int | None = Field(
        None, ge=1, description="boosting rounds; each library's own if not given"
    )
    draws: int = Field(1000, ge=100, description="redraws of the patients")
    results: Path | None = Field(
        None, description="folder of the CSV; benchmarks/results if not given"
    )


def ablation(settings: AblationSettings) -> None:
    """Fits an ensemble for each set of features and each library and compares them with the first set."""
    sets = settings.features or (*TABULAR, *(IMAGES if settings.embeddings else ()))
    rows: list[Row] = []
    for libraries in settings.libraries:
        with tempfile.TemporaryDirectory() as folder:
            first = _fitted(settings, sets[0], libraries, Path(folder))
            for words in sets:
                ensemble = (
                    first if words == sets[0] else _fitted(settings, words, libraries, Path(folder))
                )
                rows.append(
                    {
                        "data": settings.label,
                        "features": words,
                        "model": libraries,
                        **judged(first, ensemble, settings.data, settings.draws),
                    }
                )
                print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    print(f"appended to {append('ablation', rows, settings.results)}")


def _fitted(settings: AblationSettings, features: str, libraries: str, folder: Path) -> Ensemble:
    chosen = {key: getattr(settings, key) for key in SHARED}
    words = {"features": features.replace("+", ","), "libraries": tuple(libraries.split("+"))}
    with contextlib.redirect_stdout(io.StringIO()):
        fit_ensemble(
            build(FitSettings, {**chosen, **words, "output_dir": folder, "name": features})
        )
    return open_ensemble(folder / features)


def judged(first: Ensemble, ensemble: Ensemble, data: Path, num_draws: int) -> Row:
    """Returns an ensemble's out-of-fold scores, and how it compares with the first one."""
    scores = ensemble.manifest["scores"]
    by_seed = pauc_by_seed(ensemble)
    return {
        "num_features": len(ensemble.state.names) or 1,
        "rows": len(ensemble.oof()),
        "pauc": round(scores["pauc"], 4),
        "auc": round(scores["auc"], 4),
        "pauc_mean_of_seeds": round(float(np.mean(list(by_seed.values()))), 4) if by_seed else None,
        **compare_sides([first], [ensemble], data, num_draws).row(),
    }
