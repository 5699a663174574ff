"""The fields of `ensemble.json`, of an ensemble and of a blend, that commands read."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from infer.ensemble.boosting.libraries import LIBRARIES
from isic.runtime.fields import Count, Fields, FileName, Index, Share, check_fields

FIT_AGAIN = "fit the ensemble again"


class BoosterFields(Fields):
    """A booster's file."""

    file: FileName
    library: str
    fold: int
    seed: int


class OriginFields(Fields):
    """The embeddings that an ensemble was fitted with."""

    folds: list[Index]
    folds_digest: str
    checkpoints: dict[str, str]
    tta: str


class LesionFields(Fields):
    """Percentiles of the training patients' numbers of lesions."""

    patients: Count
    percentiles: dict[str, int]


class TriageFields(Fields):
    """Lesions to look at per malignant one found, at one sensitivity."""

    number_needed: Share
    low: Share
    high: Share


class CalibrationFields(Fields):
    """Measures of probabilities before and after calibration."""

    method: str
    malignant: Share
    mean_before: Share
    mean_after: Share
    brier_before: Share
    brier_after: Share
    error_before: Share
    error_after: Share


class ScoreFields(Fields):
    """Out-of-fold metrics."""

    pauc: Share
    auc: Share
    top_15_by_lesion: Share
    top_15_by_patient: Share
    pauc_by_fold: list[Share | None]
    pauc_mean: Share | None
    pauc_std: Share | None
    patients_with_malignant: Index
    patients_of_at_most_15: Index
    pauc_by_split: dict[str, Share] = Field({})
    pauc_mean_of_splits: Share = 0.0
    pauc_std_of_splits: Share = 0.0
    triage: dict[str, TriageFields] | None = None
    calibration: CalibrationFields | None = None


class ManifestFields(Fields):
    """The fields that ensembles and blends have in common."""

    format: int
    files: dict[FileName, str]
    weights: dict[str, Share]
    folds_digest: str
    lesions_per_patient: LesionFields
    scores: ScoreFields
    versions: dict[str, str]
    chosen_on_scored_rows: list[str] = Field([])

    @model_validator(mode="after")
    def _weighs_something(self) -> Self:
        if not any(self.weights.values()):
            raise ValueError("no weight is above 0")
        return self


class EnsembleFields(ManifestFields):
    """The fields of an ensemble."""

    features: str
    boosters: list[BoosterFields]
    embeddings: dict[str, OriginFields]
    frozen: dict[str, dict[str, Any]]
    lists: dict[str, list[str]] | None = None
    definitions: dict[str, dict[str, Any]] | None = None
    tables: dict[str, dict[str, Any]] | None = None
    settings: dict[str, Any] = Field({})

    @model_validator(mode="after")
    def _has_all_boosters(self) -> Self:
        """Every library that has a weight needs a booster per fold and seed."""
        keys = {(each.library, each.fold, each.seed) for each in self.boosters}
        libraries = {library for library, _, _ in keys}
        if not keys:
            return self
        if libraries != self.weights.keys() or not libraries <= LIBRARIES.keys():
            raise ValueError(f"boosters of {', '.join(libraries)}, weights of others")
        folds, seeds = {fold for _, fold, _ in keys}, {seed for _, _, seed in keys}
        grid = set(product(libraries, folds, seeds))
        if len(keys) < len(self.boosters) or keys != grid:
            raise ValueError("not one booster per library, fold and seed")
        if not {each.file for each in self.boosters} <= self.files.keys():
            raise ValueError("a booster is not among the files")
        return self


class BlendFields(ManifestFields):
    """The fields of a blend."""

    members: dict[FileName, str]
    weights_by_fold: dict[str, dict[str, Share]]

    @model_validator(mode="after")
    def _weighs_its_members(self) -> Self:
        for weights in (self.weights, *self.weights_by_fold.values()):
            if weights.keys() != self.members.keys():
                raise ValueError("weights of others than the members")
        if not all(fold.isdecimal() for fold in self.weights_by_fold):
            raise ValueError("weights_by_fold has other keys than folds")
        return self


def check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise a UserError if a field of an ensemble or a blend is missing or damaged."""
    fields = BlendFields if "members" in manifest else EnsembleFields
    check_fields(path, manifest, fields, FIT_AGAIN)
