"""`python -m infer compare A B`: whether one ensemble is better than another out of fold, or only luckier."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import ttest_rel

from infer.ensemble.artifact import Ensemble, open_ensemble
from infer.ensemble.blend import blend, model_name, seeds_of
from isic import schema
from isic.config import Settings
from isic.dataset import Dataset
from isic.errors import UserError
from isic.metadata import with_patient
from isic.metrics import bootstrap_pauc, pauc

SIGNIFICANT = 0.05


class CompareSettings(Settings):
    """Settings of `infer compare`."""

    positional: ClassVar[tuple[str, ...]] = ("first", "second")

    first: Path = Field(description="an ensemble's folder; the first argument")
    second: Path = Field(description="another's, on the same rows and folds; the second argument")
    data: Path = Field(Path("data/isic-2024"), description="dataset folder, for the patients")
    draws: int = Field(1000, ge=100, description="redraws of the patients")
    seed: int = Field(0, ge=0, description="seed of the redraws")


def compare(settings: CompareSettings) -> None:
    """Compares two ensembles: a paired test over their seeds and a bootstrap over patients.

    The seeds say whether the difference outlasts the chance in fitting, the patients whether it outlasts the chance
    in who was examined. It is noise unless both say otherwise, and the same way.
    """
    ensembles = [open_ensemble(path) for path in (settings.first, settings.second)]
    first, second = (ensemble.oof().sort(schema.ID) for ensemble in ensembles)
    if not first.select(schema.ID, "fold", schema.TARGET).equals(
        second.select(schema.ID, "fold", schema.TARGET)
    ):
        raise UserError(
            f"{ensembles[0].root} and {ensembles[1].root} were scored on other rows or folds; fit both on the same"
        )
    print(f"{'':12} {'first':>8} {'second':>8} {'second - first':>15}")
    by_seed = _test_seeds(paired(*(pauc_by_seed(ensemble) for ensemble in ensembles)))
    by_patient = _test_patients(first, second, _patients(first, settings.data), settings)
    if by_seed is None:
        print("the ensembles share fewer than two seeds, so the bootstrap alone decides")
    certain = by_patient and by_seed in (None, by_patient)
    print(f"\nsecond against first: {'a difference' if certain else 'noise'}")


def pauc_by_seed(ensemble: Ensemble) -> dict[int, float]:
    """Returns the pooled pAUC of what an ensemble would be with one seed alone; empty where it has no boosters."""
    weights, models = ensemble.weights, ensemble.oof_models()
    target = ensemble.oof()[schema.TARGET].to_numpy()
    found = {}
    for seed in seeds_of(models, weights) if ensemble.manifest["boosters"] else []:
        of_seed = {
            name: models[name] for name in (model_name(library, seed) for library in weights)
        }
        found[seed] = pauc(target, blend(of_seed, weights, of_seed))
    return found


def paired(first: dict[int, float], second: dict[int, float]) -> NDArray[np.float64]:
    """Returns [num_seeds, 2] for the seeds that both have."""
    return np.array([[first[seed], second[seed]] for seed in first if seed in second]).reshape(
        -1, 2
    )


def _test_seeds(seeds: NDArray[np.float64]) -> int | None:
    """Prints the paired test. Returns the sign of a significant difference, else 0; None with fewer than two seeds."""
    if len(seeds) < 2:
        return None
    mean, difference = seeds.mean(axis=0), seeds[:, 1] - seeds[:, 0]
    p = 1.0 if not difference.any() else float(ttest_rel(seeds[:, 1], seeds[:, 0]).pvalue)
    wins = int((difference > 0).sum())
    print(
        f"{'seeds':12} {mean[0]:8.4f} {mean[1]:8.4f} {difference.mean():+15.4f}"
        f"   p = {p:.2g}, better in {wins} of {len(seeds)}"
    )
    return int(np.sign(difference.mean())) if p < SIGNIFICANT else 0


def _test_patients(
    first: pl.DataFrame, second: pl.DataFrame, patient: pl.Series, settings: CompareSettings
) -> int:
    """Prints the bootstrap of the blends. Returns the sign of its 95 % interval, 0 where zero lies in it."""
    draws = bootstrap_pauc(
        first[schema.TARGET],
        [first["blend"], second["blend"]],
        patient,
        settings.draws,
        settings.seed,
    )
    low, middle, high = np.percentile(draws[:, 1] - draws[:, 0], [2.5, 50, 97.5])
    mean = draws.mean(axis=0)
    print(
        f"{'patients':12} {mean[0]:8.4f} {mean[1]:8.4f} {middle:+15.4f}   95 % of redraws in {low:+.4f} .. {high:+.4f}"
    )
    return int(low > 0) - int(high < 0)


def _patients(oof: pl.DataFrame, data: Path) -> pl.Series:
    metadata = with_patient(Dataset(data).metadata("train")).select(schema.ID, schema.PATIENT)
    patient = oof.select(schema.ID).join(metadata, on=schema.ID, how="left", maintain_order="left")[
        schema.PATIENT
    ]
    if patient.null_count():
        raise UserError(
            f"{data} lacks {patient.null_count()} of the scored rows; give the --data they were fitted on"
        )
    return patient
