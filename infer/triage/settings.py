"""Settings of `python -m infer triage`."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import AliasChoices, Field

from infer.trust import trust_field
from isic.layout import OUTPUT_DIR, REMOTE_DATASET
from isic.runtime.config import Settings, Several
from isic.runtime.urls import Wanted


class TriageSettings(Settings):
    """Write a page per patient with the lesions to look at first and the reasons, and an index.

    Example: infer triage --ensemble outputs/ensemble/engineered --patient IP_0000123
    """

    remote_inputs: ClassVar[Mapping[str, Wanted]] = {"data": REMOTE_DATASET}

    data: Path = Field(Path("data/isic-2024"), description="dataset folder or URL")
    ensemble: Path = Field(
        OUTPUT_DIR / "ensemble",
        description="an ensemble's folder, or one with a single ensemble in it",
    )
    split: Literal["train", "test"] = Field(
        "test",
        description="split that the patients are of; train scores are out of fold, and need the "
        "dataset that the ensemble was fitted on",
    )
    patient: Several[str] = Field(
        (), description="patient_ids with commas between them; if not given, --max_patients"
    )
    max_patients: int = Field(
        100, ge=1, description="number of patients with a page, those with the highest scores"
    )
    embeddings: Several[Path] = Field(
        (),
        description="outputs/embeddings/<config> of each network that the ensemble was fitted with",
    )
    frozen: Several[Path] = Field(
        (), description="embeddings of each frozen network that the ensemble was fitted with"
    )
    tables: Several[str] = Field(
        (), description="the ensemble's tables of own columns, with the rows of the split"
    )
    maps: Path | None = Field(
        None,
        description="outputs/<config> of a network with exported folds, to draw occlusion maps; "
        "takes 50 runs of the network per image",
    )
    output: Path = Field(
        OUTPUT_DIR / "triage.html",
        validation_alias=AliasChoices("output", "out"),
        description="the index to write; the patients' pages go into the folder of its name, "
        "without .html",
    )
    num_threads: int = Field(0, ge=0, description="threads, 0 for all")
    trust: bool = trust_field()
