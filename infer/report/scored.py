"""What a report is made from: an ensemble's out-of-fold scores beside the dataset that they belong to."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl

from infer.ensemble.artifact import Ensemble
from isic import schema
from isic.dataset import Dataset
from isic.images import ImageStore
from isic.metadata import with_patient
from isic.metrics import TopK, pauc, roc_auc, top_k
from isic.runtime.errors import UserError

BLEND = "blend"
GROUP = "_patient"
"""The patient as a number, which is far faster to group by than text."""


@dataclass(frozen=True)
class Judgement:
    """How many rows there are and how well they are scored; a score is None where they are of one class."""

    name: str
    num_lesions: int
    num_malignant: int
    num_patients: int
    pauc: float | None = None
    auc: float | None = None
    top: TopK | None = None


def judge(name: str, rows: pl.DataFrame, model: str = BLEND) -> Judgement:
    """Scores a model on some rows of `Scored.oof`."""
    target, score, patient = (rows[column].to_numpy() for column in (schema.TARGET, model, GROUP))
    counts = len(rows), int(target.sum()), rows[GROUP].n_unique()
    if target.min() == target.max():
        return Judgement(name, *counts)
    values = pauc(target, score), roc_auc(target, score), top_k(target, score, patient)
    return Judgement(name, *counts, *values)


@dataclass(frozen=True)
class Scored:
    """An ensemble, its scores and its data."""

    ensemble: Ensemble
    oof: pl.DataFrame
    """`isic_id`, `fold`, `target`, a column a model, `blend`, `patient_id` (the row's own id where it is not known)
    and GROUP."""
    metadata: pl.DataFrame
    images: ImageStore | None
    images_missing: str
    """Why there are no images."""

    @property
    def models(self) -> list[str]:
        """The names of the models, the blend left out."""
        others = {schema.ID, "fold", schema.TARGET, BLEND, schema.PATIENT, GROUP}
        return [name for name in self.oof.columns if name not in others]

    @cached_property
    def pooled(self) -> Judgement:
        return judge("pooled", self.oof)

    @cached_property
    def by_fold(self) -> list[Judgement]:
        return [judge(str(fold), rows) for (fold,), rows in sorted(self.oof.group_by("fold"))]


def read_scored(ensemble: Ensemble, data: Path) -> Scored:
    """Joins an ensemble's scores with its dataset. Raises UserError where that lacks a scored row."""
    dataset = Dataset(data)
    metadata = dataset.metadata("train")
    patients = with_patient(metadata).select(
        schema.ID, schema.PATIENT, pl.col(schema.PATIENT).rank("dense").alias(GROUP)
    )
    oof = ensemble.oof().join(patients, on=schema.ID, how="left", maintain_order="left")
    if missing := oof[schema.PATIENT].null_count():
        raise UserError(
            f"{data} lacks {missing} of the scored rows; give the --data that {ensemble.root} was fitted on"
        )
    try:
        images, reason = dataset.find_images("train"), "This dataset has no images."
    except UserError as error:  # the scores do not need them
        images, reason = None, f"The images cannot be read: {error}."
    return Scored(ensemble, oof, metadata, images, reason)
