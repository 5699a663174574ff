"""Settings of `python -m infer triage`."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import AliasChoices, Field, model_validator

from infer.ensemble.settings import HOW_TO_SCORE, ScoreSettings
from infer.trust import trust_field
from isic.layout import OUTPUT_DIR, REMOTE_DATASET
from isic.runtime.config import Several
from isic.runtime.urls import Wanted


class TriageSettings(ScoreSettings):
    """Write a page per patient with the lesions to look at first and the reasons, and an index.

    Example: infer triage --ensemble outputs/ensemble/engineered --patient IP_0000123
    """

    remote_inputs: ClassVar[Mapping[str, Wanted]] = {"data": REMOTE_DATASET}

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
    maps: Path | None = Field(
        None,
        description="outputs/<config> of a network whose exported folds, or with --rows all its "
        "fold_all, draw occlusion maps; takes 50 runs of the network per image",
    )
    output: Path = Field(
        OUTPUT_DIR / "triage.html",
        validation_alias=AliasChoices("output", "out"),
        description="the index to write; the patients' pages go into the folder of its name, "
        "without .html",
    )
    trust: bool = trust_field()

    @model_validator(mode="after")
    def _consistent(self) -> "TriageSettings":
        for name in HOW_TO_SCORE:
            default = type(self).model_fields[name].default
            if self.split == "train" and getattr(self, name) != default:
                raise ValueError(
                    f"--{name} is for scores of new rows, and those of --split train are out of "
                    "fold; leave one of the two out"
                )
        return self
