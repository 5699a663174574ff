"""Settings of `python -m infer report`."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from infer.trust import trust_field
from isic.layout import OUTPUT_DIR, REMOTE_DATASET
from isic.runtime.config import Settings, Several
from isic.runtime.urls import Wanted


class ReportSettings(Settings):
    """Write the report of a fitted ensemble again."""

    remote_inputs: ClassVar[Mapping[str, Wanted]] = {"data": REMOTE_DATASET}

    ensemble: Path = Field(
        OUTPUT_DIR / "ensemble",
        description="folder of an ensemble, or a folder with a single ensemble in it",
    )
    data: Path = Field(
        Path("data/isic-2024"), description="dataset folder or URL that the ensemble was fitted on"
    )
    by: Several[str] = Field(
        (),
        description="also score groups of lesions: by ita (skin tone by the individual typology "
        "angle), age (decades), a column of texts, or one of numbers (quartiles), such as "
        "ita,sex,attribution; also written to subgroups.csv",
    )
    embeddings: Several[Path] = Field(
        (), description="outputs/embeddings/<config> of each network to draw a map of"
    )
    maps: Path | None = Field(
        None,
        description="outputs/<config> of a network with exported folds, to draw the occlusion map "
        "of each miss and false alarm; takes 50 runs of the network per image",
    )
    trust: bool = trust_field()
