"""Settings of `python -m infer report`."""

from pathlib import Path

from pydantic import Field

from isic.layout import OUTPUT_DIR
from isic.runtime.config import Settings


class ReportSettings(Settings):
    """Write the report of a fitted ensemble again."""

    ensemble: Path = Field(
        OUTPUT_DIR / "ensemble",
        description="folder of an ensemble, or of a folder with a single ensemble in it",
    )
    data: Path = Field(
        Path("data/isic-2024"), description="dataset folder that the ensemble was fitted on"
    )
    embeddings: Path | None = Field(
        None, description="outputs/embeddings/<config>, for the map of embeddings"
    )
