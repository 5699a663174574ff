"""Input of a report: an ensemble's out-of-fold scores joined with their dataset."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl

from infer.ensemble.blends.artifact import Scorer
from infer.ensemble.scoring.training_rows import patients_of
from isic import schema
from isic.dataset import Dataset
from isic.images import ImageStore
from isic.metrics import TopK, pauc, roc_auc, top_k
from isic.runtime.errors import UserError

BLEND = "blend"
# Text is much slower to group by.
GROUP = "_patient"
"""Column with the patient as a number."""


@dataclass(frozen=True)
class Judgement:
    """Number and scores of some rows; a score is None if the rows have one class only."""

    name: str
    num_lesions: int
    num_malignant: int
    num_patients: int
    pauc: float | None = None
    auc: float | None = None
    top: TopK | None = None


def judge(name: str, rows: pl.DataFrame, model: str = BLEND) -> Judgement:
    """Score a model on some rows of `Scored.oof`."""
    target = rows[schema.TARGET].to_numpy()
    score = rows[model].to_numpy()
    patient = rows[GROUP].to_numpy()
    counts = Judgement(
        name,
        num_lesions=len(rows),
        num_malignant=int(target.sum()),
        num_patients=rows[GROUP].n_unique(),
    )
    if target.min() == target.max():
        return counts
    return dataclasses.replace(
        counts,
        pauc=pauc(target, score),
        auc=roc_auc(target, score),
        top=top_k(target, score, patient),
    )


@dataclass(frozen=True)
class Scored:
    """An ensemble, its scores and its data."""

    ensemble: Scorer
    oof: pl.DataFrame
    """`isic_id`, `fold`, `target`, one column per model, `blend`, `patient_id` (of a row without a
    patient its own id) and GROUP."""
    metadata: pl.DataFrame
    images: ImageStore | None
    images_missing: str
    """The reason that there are no images, as a sentence."""

    @property
    def models(self) -> list[str]:
        """The names of the models, without the blend."""
        others = {schema.ID, "fold", schema.TARGET, BLEND, schema.PATIENT, GROUP}
        return [name for name in self.oof.columns if name not in others]

    @cached_property
    def rows(self) -> pl.DataFrame:
        """[N] the metadata of the scored lesions, in the order of `oof`."""
        return self.oof.select(schema.ID).join(
            self.metadata, on=schema.ID, how="left", maintain_order="left"
        )

    @cached_property
    def pooled(self) -> Judgement:
        return judge("pooled", self.oof)

    @cached_property
    def by_fold(self) -> list[Judgement]:
        return [judge(str(fold), rows) for (fold,), rows in sorted(self.oof.group_by("fold"))]


def read_scored(ensemble: Scorer, data: Path) -> Scored:
    """Join an ensemble's scores with its dataset.

    Raises:
        UserError: it is another dataset, see `patients_of`.
    """
    dataset = Dataset(data)
    metadata = dataset.metadata("train")
    oof = ensemble.oof()
    patient = patients_of([ensemble], oof, dataset, metadata)
    oof = oof.with_columns(patient, patient.rank("dense").alias(GROUP))
    images, reason = _find_images(dataset)
    return Scored(ensemble, oof, metadata, images, reason)


def _find_images(dataset: Dataset) -> tuple[ImageStore | None, str]:
    """Return the images, or None, with the sentence to show without them."""
    try:
        return dataset.find_images("train"), "This dataset has no images."
    except UserError as error:  # the rest of the report does not need them
        return None, f"The images cannot be read: {error}."
