"""Settings of `python -m infer explain`."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import AliasChoices, Field

from infer.formats import AUTO, Precision
from infer.trust import trust_field
from isic.layout import OUTPUT_DIR, REMOTE_DATASET
from isic.runtime.config import RunName, Settings, Several
from isic.runtime.urls import Wanted


class ExplainSettings(Settings):
    """Draw occlusion maps: the parts of an image that a network's score depends on.

    A train image is scored by the fold that held it out, a test image by the mean over the folds.
    """

    remote_inputs: ClassVar[Mapping[str, Wanted]] = {"data": REMOTE_DATASET}

    config: RunName = Field(
        validation_alias=AliasChoices("config", "model_config"),
        description="name or file of the model config (or --model_config)",
    )
    data: Path = Field(
        Path("data/isic-2024"), description="dataset in the challenge's layout, a folder or URL"
    )
    model_dir: Path | None = Field(
        None, description="training run with exported folds; outputs/<config> by default"
    )
    split: Literal["train", "test"] = Field("train", description="split that the ids are of")
    ids: Several[str] = Field(
        min_length=1, description="isic_ids with commas between them, or @FILE with one per line"
    )
    output_dir: Path = Field(
        OUTPUT_DIR / "explain",
        validation_alias=AliasChoices("output_dir", "out"),
        description="folder for a PNG per id and occlusion.parquet, the table of the values",
    )
    fill: Literal["mean", "blur"] = Field(
        "mean",
        description="content of a hidden patch: the image's mean colour, or the blurred image",
    )
    format: str = Field(
        AUTO,
        validation_alias=AliasChoices("format", "engine"),
        description="exported artifact of each fold: a file name, a format, or auto",
    )
    precision: Precision | None = Field(None, description="precision of the artifact")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of the engines")
    batch_size: int | None = Field(
        None, ge=1, description="images per engine call, as in infer embed by default"
    )
    trust: bool = trust_field()
