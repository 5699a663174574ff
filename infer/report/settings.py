"""Settings of `python -m infer report`."""

from pathlib import Path

from pydantic import Field

from isic.layout import OUTPUT_DIR
from isic.runtime.config import Settings, Several


class ReportSettings(Settings):
    """Write the report of a fitted ensemble again."""

    ensemble: Path = Field(
        OUTPUT_DIR / "ensemble",
        description="folder of an ensemble, or of a folder with a single ensemble in it",
    )
    data: Path = Field(
        Path("data/isic-2024"), description="dataset folder that the ensemble was fitted on"
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
        description="outputs/<config> of a network with exported folds, to draw the occlusion map of "
        "each miss and false alarm; takes 50 runs of the network per image",
    )
