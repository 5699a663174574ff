"""The page itself: sections of plain HTML around the charts. No script, and nothing that is not in the file."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infer.report.cases import Case, Lesion, Picture
from infer.report.markup import Markup, join, tag

CSS = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser lets the page load: nothing from outside, and no script even if one got in."""

ROW = {
    "Diagnosis": ("iddx_full", ""),
    "Age": ("age_approx", ""),
    "Sex": ("sex", ""),
    "Site": ("tbp_lv_location", ""),
    "Size": ("clin_size_long_diam_mm", " mm"),
    "Border": ("tbp_lv_norm_border", " of 10"),
    "Colour": ("tbp_lv_norm_color", " of 10"),
    "Nevus": ("tbp_lv_nevi_confidence", " of 100"),
}
"""What a case shows at once: label, column and unit. The other columns unfold."""

Pictures = Mapping[str, Picture]


NONE = "\N{EN DASH}"
"""Where a table has no value."""


def percent(share: float, decimals: int | None = None) -> str:
    """Returns a share as percent, with two digits that say something where `decimals` is not given: 0.098 %, 75 %."""
    value = 100 * share
    if decimals is None:
        decimals = max(0, 1 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{decimals}f}\N{NO-BREAK SPACE}%"


def document(title: str, *body: str) -> str:
    """Returns the whole file."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("style", Markup(CSS.read_text(encoding="utf-8"))),
    )
    return "<!doctype html>\n" + tag("html", head, "\n", tag("body", *body), lang="en") + "\n"


def section(name: str, title: str, *body: str) -> Markup:
    """Returns a section; `name` is what `links` calls it."""
    return join("\n", tag("section", tag("h2", title), *body, id=name.lower()))


def links(names: Iterable[str]) -> Markup:
    """Returns the page's own table of contents."""
    items = (tag("a", name.replace("-", " "), href=f"#{name.lower()}") for name in names)
    return tag("nav", *items, aria_label="Sections")


def tiles(items: Iterable[tuple[str, str, str]]) -> Markup:
    """Returns large figures: label, value and a line of explanation."""
    return tag(
        "dl",
        *(
            tag("div", tag("dt", label), tag("dd", value), tag("dd", more))
            for label, value, more in items
        ),
        class_="tiles",
    )


def table(
    caption: str, heading: Sequence[str], rows: Iterable[Sequence[str]], sums: int = 0
) -> Markup:
    """Returns a table that scrolls on its own where it is wider than the screen.

    Args:
        rows: as many cells as the heading; the first is the row's own heading.
        sums: rows at the end that stand out.
    """
    body = list(rows)
    lines = (
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell) for cell in row[1:]),
            class_="sum" if place >= len(body) - sums else None,
        )
        for place, row in enumerate(body)
    )
    head = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in heading)))
    content = tag("table", tag("caption", caption), head, tag("tbody", *lines))
    return tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption)


def bars(caption: str, heading: Sequence[str], rows: Sequence[tuple[Markup, float]]) -> Markup:
    """Returns a table of shares with a bar each, the longest full."""
    longest = max((share for _, share in rows), default=0) or 1
    head = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in (*heading, ""))))
    lines = (
        tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", percent(share, 1)),
            tag("td", tag("span", style=f"width:{share / longest:.1%}"), class_="bar"),
        )
        for name, share in rows
    )
    return tag("table", tag("caption", caption), head, tag("tbody", *lines), class_="bars")


def code(name: str) -> Markup:
    """Returns a column's name, which may break after its underscores."""
    first, *rest = name.split("_")
    return tag("code", first, *(join("_", tag("wbr"), part) for part in rest))


def facts(items: Mapping[str, str], class_: str = "facts") -> Markup:
    """Returns a list of names and values."""
    return tag(
        "dl",
        *(tag("div", tag("dt", key), tag("dd", value)) for key, value in items.items()),
        class_=class_,
    )


def case(item: Case, large: Pictures, small: Pictures) -> Markup:
    """Returns a lesion with its row and its patient's other lesions. Pictures by id; none where there are no images."""
    name = item.lesion.name
    words = tag("div", tag("h3", name, class_="id"), _standing(item)), facts(_row(item.row), "row")
    image = (photo(large[name], f"lesion {name}"),) if large else ()
    main = tag("div", *image, *words, class_="case" if large else None)
    return tag("article", main, _others(item, small), _whole_row(item.row))


def _standing(item: Case) -> Markup:
    other = "malignant" if item.lesion.target == 0 else "benign"
    place = (
        f"number {item.rank:,} of its patient's {item.num_lesions:,}"
        if item.num_lesions > 1
        else "its patient's only one"
    )
    return join(
        tag("p", "score ", tag("b", score(item.lesion.score)), class_="score"),
        tag(
            "p",
            f"Higher than {percent(item.beaten, 1)} of the {other} lesions; {place}.",
            class_="standing",
        ),
    )


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        label: _value(row[name]) + unit
        for label, (name, unit) in ROW.items()
        if row.get(name) is not None
    }


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return " → ".join(dict.fromkeys(str(value).split("::")))


def _others(item: Case, small: Pictures) -> Markup:
    if item.patient is None:
        return tag("p", "The dataset does not say whose lesion this is.", class_="beside")
    if not item.others:
        return tag("p", f"Patient {item.patient} has no other lesion here.", class_="beside")
    shown = f"the {len(item.others)} of {item.num_lesions - 1:,} others that score highest"
    if len(item.others) == item.num_lesions - 1:
        shown = (
            "the only other lesion"
            if len(item.others) == 1
            else f"the {len(item.others)} other lesions"
        )
    beside = tag("p", f"Patient {item.patient}: {shown}", class_="beside")
    return join(
        beside, tag("ul", *(_other(lesion, small) for lesion in item.others), class_="others")
    )


def _other(lesion: Lesion, small: Pictures) -> Markup:
    label = "malignant" if lesion.target else "benign"
    image = photo(small[lesion.name], f"{label} lesion {lesion.name}") if small else ""
    return tag("li", image, score(lesion.score), tag("br"), label, class_=label, title=lesion.name)


def photo(picture: Picture, alt: str) -> Markup:
    """Returns a thumbnail, or a frame that says why there is none."""
    if picture.reason:
        return tag(
            "div",
            picture.reason,
            class_="photo blank",
            role="img",
            aria_label=f"{alt}: {picture.reason}",
        )
    return tag("img", src=picture.uri, alt=alt, class_="photo")


def _whole_row(row: Mapping[str, Any]) -> Markup:
    lines = (
        tag(
            "tr", tag("th", code(name), scope="row"), tag("td", "" if value is None else str(value))
        )
        for name, value in row.items()
    )
    content = tag("div", tag("table", tag("tbody", *lines)), class_="scroll")
    return tag("details", tag("summary", f"All {len(row)} columns"), content)


def score(value: float) -> str:
    """Returns a score with three digits that say something."""
    return f"{value:.3f}" if value >= 0.1 else f"{value:.2g}"
