"""`python -m infer report`: what an ensemble is worth and where it errs, as one HTML file that opens anywhere."""

from pathlib import Path

from pydantic import Field

from infer.ensemble.artifact import open_ensemble
from infer.report import page
from infer.report.markup import tag
from infer.report.scored import read_scored
from infer.report.sections import header, sections
from isic.runtime.config import Settings
from isic.runtime.files import write_text

FILE = "report.html"


class ReportSettings(Settings):
    """Settings of `infer report`."""

    ensemble: Path = Field(
        Path("outputs/ensemble"),
        description="an ensemble's folder, or one with a single ensemble in it",
    )
    data: Path = Field(Path("data/isic-2024"), description="dataset folder that it was fitted on")
    embeddings: Path | None = Field(
        None, description="outputs/embeddings/<config>, for the map of embeddings"
    )


def report(settings: ReportSettings) -> None:
    """Writes an ensemble's report.html again: curves, tables, what the trees look at, the worst errors."""
    print(f"report: {write_report(settings.ensemble, settings.data, settings.embeddings)}")


def write_report(ensemble: Path, data: Path, embeddings: Path | None = None) -> Path:
    """Writes `report.html` into an ensemble's folder and returns its path.

    Args:
        ensemble: the folder.
        data: the dataset that it was fitted on; its images are shown where it has them.
        embeddings: the embedding run that it was fitted with, for the map.

    Raises:
        UserError: no ensemble, other data, or embeddings of another fold plan.
    """
    scored = read_scored(open_ensemble(ensemble), data)
    parts = sections(scored, embeddings)
    body = (page.section(name, title, *content) for name, (title, content) in parts.items())
    name, path = scored.ensemble.root.name, scored.ensemble.root / FILE
    write_text(
        path,
        page.document(f"{name}: out-of-fold report", header(scored, parts), tag("main", *body)),
    )
    return path
