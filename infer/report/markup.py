"""HTML and SVG as values. What is not Markup already is escaped, so nothing in a dataset can become part of a page."""

from html import escape


class Markup(str):
    """Text that is HTML as it stands."""

    __slots__ = ()


VOID = frozenset(("img", "meta", "br", "wbr"))
Attribute = str | float | None


def tag(name: str, /, *children: str, **attributes: Attribute) -> Markup:
    """Returns an element.

    Args:
        children: Markup, or text, which is escaped.
        attributes: `class_` is written class and `stroke_width` stroke-width; one that is None is left out.
    """
    written = "".join(
        _attribute(key, value) for key, value in attributes.items() if value is not None
    )
    end = "" if name in VOID else f"{join(*children)}</{name}>"
    return Markup(f"<{name}{written}>{end}")


def join(*children: str) -> Markup:
    """Returns the children one after the other, text escaped."""
    return Markup(
        "".join(child if isinstance(child, Markup) else escape(child) for child in children)
    )


def _attribute(key: str, value: str | float) -> str:
    text = value if isinstance(value, str) else number(value)
    return f' {key.rstrip("_").replace("_", "-")}="{escape(text)}"'


def number(value: float) -> str:
    """Returns a coordinate: one decimal, none where it is 0."""
    text = f"{value:.1f}"
    return (
        text.removesuffix(".0").replace("-0", "0")
        if text in {"-0.0", "0.0"}
        else text.removesuffix(".0")
    )
