"""`python -m infer report`: an ensemble's scores and worst errors as one HTML file."""

from pathlib import Path

from pydantic import Field

from infer.ensemble.artifact import open_ensemble
from infer.report.scored import read_scored
from infer.report.sections import header, sections
from isic.html import page
from isic.html.markup import tag
from isic.runtime.config import Settings
from isic.runtime.files import write_text

REPORT_FILE = "report.html"
STYLE = Path(__file__).with_name("report.css")


class ReportSettings(Settings):
    """Settings of `infer report`."""

    ensemble: Path = Field(
        Path("outputs/ensemble"),
        description="folder of an ensemble, or of a folder with a single ensemble in it",
    )
    data: Path = Field(
        Path("data/isic-2024"), description="dataset folder that the ensemble was fitted on"
    )
    embeddings: Path | None = Field(
        None, description="outputs/embeddings/<config>, for the map of embeddings"
    )


def report(settings: ReportSettings) -> None:
    """Writes an ensemble's report.html: curves, tables, feature importance, worst errors."""
    print(f"report: {write_report(settings.ensemble, settings.data, settings.embeddings)}")


def write_report(ensemble: Path, data: Path, embeddings: Path | None = None) -> Path:
    """Writes `report.html` into an ensemble's folder and returns its path.

    Args:
        ensemble: the folder.
        data: the dataset that it was fitted on; its images, if any, are shown.
        embeddings: the embedding run that it was fitted with, for the map.

    Raises:
        UserError: no ensemble, other data, or embeddings of another fold plan.
    """
    scored = read_scored(open_ensemble(ensemble), data)
    parts = sections(scored, embeddings)
    body = (page.section(name, title, *content) for name, (title, content) in parts.items())
    name = scored.ensemble.root.name
    text = page.document(
        f"{name}: out-of-fold report",
        header(scored, parts),
        tag("main", *body),
        style=STYLE.read_text(encoding="utf-8"),
    )
    path = scored.ensemble.root / REPORT_FILE
    write_text(path, text)
    return path
