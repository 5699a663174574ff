"""An HTML page and the parts of its sections, without scripts or external files."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from isic.html.markup import Markup, join, tag
from isic.html.plot import PLOT_STYLE

PAGE_STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy: loads nothing from outside and runs no script."""
NONE = "\N{EN DASH}"
"""Cell of a table without a value."""


def document(title: str, *body: str, style: str = "") -> str:
    """Return the whole file; `style` is CSS in addition to that of every page."""
    css = PLOT_STYLE.read_text(encoding="utf-8") + PAGE_STYLE.read_text(encoding="utf-8") + style
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("style", Markup(css)),
    )
    return "<!doctype html>\n" + tag("html", head, "\n", tag("body", *body), lang="en") + "\n"


def section(name: str, title: str, *body: str) -> Markup:
    """Return a section; `links` refers to it by `name`."""
    return join("\n", tag("section", tag("h2", title), *body, id=name.lower()))


def links(names: Iterable[str]) -> Markup:
    """Return the page's table of contents."""
    items = (tag("a", name.replace("-", " "), href=f"#{name.lower()}") for name in names)
    return tag("nav", *items, aria_label="Sections")


def figure(title: str, chart: Markup, *caption: str) -> Markup:
    """Return a chart with its title above and its explanation, if any, below."""
    explained = [tag("figcaption", *caption)] if caption else []
    return tag("figure", tag("h3", title), chart, *explained)


def tiles(items: Iterable[tuple[str, str, str]]) -> Markup:
    """Return large numbers: label, value and a line of explanation."""
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
    """Return a table that scrolls by itself if it is wider than the screen.

    Args:
        rows: as many cells as the heading; the first is the row's own heading.
        sums: number of rows at the end that are emphasised.
    """
    lines = list(rows)
    first_sum = len(lines) - sums
    body = (
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell) for cell in row[1:]),
            class_="sum" if place >= first_sum else None,
        )
        for place, row in enumerate(lines)
    )
    content = tag("table", tag("caption", caption), _head(heading), tag("tbody", *body))
    # A focusable region, so that the keyboard can scroll it.
    return tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption)


def bars(caption: str, heading: Sequence[str], rows: Sequence[tuple[Markup, float]]) -> Markup:
    """Return a table of shares with a bar per row; the longest fills its cell."""
    longest = max((share for _, share in rows), default=0) or 1
    lines = (
        tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", percent(share, 1)),
            tag("td", tag("span", style=f"width:{share / longest:.1%}"), class_="bar"),
        )
        for name, share in rows
    )
    head = _head((*heading, ""))
    return tag("table", tag("caption", caption), head, tag("tbody", *lines), class_="bars")


def _head(heading: Sequence[str]) -> Markup:
    return tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in heading)))


def code(name: str) -> Markup:
    """Return a column's name, which may break after its underscores."""
    first, *rest = name.split("_")
    return tag("code", first, *(join("_", tag("wbr"), part) for part in rest))


def facts(items: Mapping[str, str], class_: str = "facts") -> Markup:
    """Return a list of names and values."""
    return tag(
        "dl",
        *(tag("div", tag("dt", key), tag("dd", value)) for key, value in items.items()),
        class_=class_,
    )


def percent(share: float, decimals: int | None = None) -> str:
    """Format a share as percent, with two significant digits by default: 0.098 %, 75 %."""
    value = 100 * share
    if decimals is None:
        decimals = max(0, 1 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{decimals}f}\N{NO-BREAK SPACE}%"
