"""HTML of a wrongly scored lesion: photo, score, metadata, and the patient's other lesions."""

from collections.abc import Mapping
from typing import Any

from infer.report.cases import Case, Lesion, Picture
from infer.report.occlusion import MapPicture
from isic.html import page
from isic.html.markup import Markup, join, tag

SHOWN_COLUMNS = {
    "Diagnosis": ("iddx_full", ""),
    "Age": ("age_approx", ""),
    "Sex": ("sex", ""),
    "Site": ("tbp_lv_location", ""),
    "Size": ("clin_size_long_diam_mm", " mm"),
    "Border": ("tbp_lv_norm_border", " of 10"),
    "Colour": ("tbp_lv_norm_color", " of 10"),
    "Nevus": ("tbp_lv_nevi_confidence", " of 100"),
}
"""Label, column and unit of the metadata that a card always shows; the others unfold."""

Pictures = Mapping[str, Picture]
"""Thumbnails by id; empty if the dataset has no images."""


def case_card(
    case: Case, large: Pictures, small: Pictures, maps: Mapping[str, MapPicture] | None = None
) -> Markup:
    """Return the card of a lesion.

    Args:
        small: pictures of the patient's other lesions.
        maps: occlusion maps by id; a lesion may lack one.
    """
    name = case.lesion.name
    title = tag("div", tag("h3", name, class_="id"), _ranking(case))
    metadata = page.facts(_shown_metadata(case.row), "row")
    if large:
        image = photo(large[name], f"lesion {name}")
        shown = tag("div", image, *_map(name, maps or {}), class_="photos")
        main = tag("div", shown, title, metadata, class_="case")
    else:
        main = tag("div", title, metadata)
    return tag("article", main, _others(case, small), _all_metadata(case.row))


def _map(name: str, maps: Mapping[str, MapPicture]) -> list[Markup]:
    if name not in maps:
        return []
    found = maps[name]
    image = photo(found.picture, f"occlusion map of lesion {name}")
    return [image, tag("p", f"largest change {found.largest_change:.2f}", class_="change")]


def _ranking(case: Case) -> Markup:
    other_class = "malignant" if case.lesion.target == 0 else "benign"
    place = "its patient's only one"
    if case.num_lesions > 1:
        place = f"number {case.rank:,} of its patient's {case.num_lesions:,}"
    beaten = f"Higher than {page.percent(case.beaten, 1)} of the {other_class} lesions; {place}."
    return join(
        tag("p", "score ", tag("b", _score_text(case.lesion.score)), class_="score"),
        tag("p", beaten, class_="standing"),
    )


def _shown_metadata(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        label: _value_text(row[column]) + unit
        for label, (column, unit) in SHOWN_COLUMNS.items()
        if row.get(column) is not None
    }


def _value_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    # iddx_full joins the levels of a diagnosis by "::"; equal levels are shown once.
    return " → ".join(dict.fromkeys(str(value).split("::")))


def _others(case: Case, small: Pictures) -> Markup:
    if case.patient is None:
        return tag("p", "The patient of this lesion is unknown.", class_="beside")
    if not case.others:
        return tag("p", f"Patient {case.patient} has no other lesion here.", class_="beside")
    heading = tag("p", f"Patient {case.patient}: {_others_text(case)}", class_="beside")
    items = (_other(lesion, small) for lesion in case.others)
    return join(heading, tag("ul", *items, class_="others"))


def _others_text(case: Case) -> str:
    num_shown = len(case.others)
    num_others = case.num_lesions - 1
    if num_shown < num_others:
        return f"the {num_shown} of {num_others:,} others that score highest"
    return "the only other lesion" if num_shown == 1 else f"the {num_shown} other lesions"


def _other(lesion: Lesion, small: Pictures) -> Markup:
    label = "malignant" if lesion.target else "benign"
    image = photo(small[lesion.name], f"{label} lesion {lesion.name}") if small else ""
    score = _score_text(lesion.score)
    return tag("li", image, score, tag("br"), label, class_=label, title=lesion.name)


def photo(picture: Picture, alt: str) -> Markup:
    """Return a thumbnail, or a frame with the reason that there is none."""
    if picture.reason:
        label = f"{alt}: {picture.reason}"
        return tag("div", picture.reason, class_="photo blank", role="img", aria_label=label)
    return tag("img", src=picture.uri, alt=alt, class_="photo")


def _all_metadata(row: Mapping[str, Any]) -> Markup:
    lines = (
        tag("tr", tag("th", page.code(name), scope="row"), tag("td", _cell(value)))
        for name, value in row.items()
    )
    content = tag("div", tag("table", tag("tbody", *lines)), class_="scroll")
    return tag("details", tag("summary", f"All {len(row)} columns"), content)


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def _score_text(score: float) -> str:
    return f"{score:.3f}" if score >= 0.1 else f"{score:.2g}"
