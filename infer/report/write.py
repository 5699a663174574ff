"""`python -m infer report`: an ensemble's scores and worst errors as one HTML file."""

from collections.abc import Sequence
from pathlib import Path

from infer.ensemble.artifact import REPORT_FILE, SUBGROUPS_FILE
from infer.ensemble.blends.artifact import open_scorer
from infer.report.occlusion import open_network
from infer.report.scored import read_scored
from infer.report.sections import header, sections
from infer.report.settings import ReportSettings
from infer.report.subgroups import diagnosis_note, group_rows, score_groups
from isic.html import page
from isic.html.markup import tag
from isic.runtime.errors import warn
from isic.runtime.files import write_text
from isic.runtime.only_writer import only_writer

REPORT_STYLE = Path(__file__).with_name("report.css")


def report(settings: ReportSettings) -> None:
    """Write an ensemble's report.html: curves, tables, feature importance, worst errors."""
    path = write_report(
        settings.ensemble,
        settings.data,
        settings.embeddings,
        settings.maps,
        settings.by,
        settings.trust,
    )
    print(f"report: {path}")
    if settings.by:
        print(f"subgroups: {path.with_name(SUBGROUPS_FILE)}")


def write_report(
    ensemble: Path,
    data: Path,
    embeddings: Sequence[Path] = (),
    maps: Path | None = None,
    by: Sequence[str] = (),
    trust: bool = False,
) -> Path:
    """Write `report.html` into an ensemble's folder and return its path.

    Args:
        data: the dataset that it was fitted on; its images, if any, are shown.
        embeddings: embedding runs that it was fitted with, for the maps of embeddings.
        maps: a training run that it was fitted with, for occlusion maps; none are drawn if None.
        by: properties of lesions to score groups of, see `group_rows`; `subgroups.csv` is written
            beside the report.
        trust: whether to load native code of `maps` that this user has not exported.

    Raises:
        UserError: no ensemble, other data, an unknown property, or embeddings or a training run of
            another network or fold plan.
    """
    scored = read_scored(open_scorer(ensemble), data)
    groupings = group_rows(scored.rows, by)
    note = diagnosis_note(by)
    if note:
        warn(note)
    network = open_network(scored.ensemble, maps, trust) if maps else None
    groups = score_groups(scored.oof, groupings) if groupings else None
    parts = sections(scored, embeddings, network, groups)
    body = (page.section(name, title, *content) for name, (title, content) in parts.items())
    name = scored.ensemble.root.name
    text = page.document(
        f"{name}: out-of-fold report",
        header(scored, parts),
        tag("main", *body),
        style=REPORT_STYLE.read_text(encoding="utf-8"),
    )
    path = scored.ensemble.root / REPORT_FILE
    with only_writer(path.parent):
        if groups is not None:
            write_text(path.with_name(SUBGROUPS_FILE), groups.write_csv())
        write_text(path, text)
    return path
