"""HTML and SVG as values; text is escaped, so nothing in a dataset can become markup."""

from html import escape

VOID = frozenset(("img", "meta", "br", "wbr"))
"""Elements without content and end tag."""
Attribute = str | float | None


class Markup(str):
    """Text that is HTML already and is not escaped."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: Attribute) -> Markup:
    """Return an element.

    Args:
        children: Markup, or text, which is escaped.
        attributes: `class_` becomes class and `stroke_width` stroke-width; None is left out.
    """
    written = "".join(
        _attribute(key, value) for key, value in attributes.items() if value is not None
    )
    end = "" if name in VOID else f"{join(*children)}</{name}>"
    return Markup(f"<{name}{written}>{end}")


def join(*children: str) -> Markup:
    """Concatenate the children; text is escaped."""
    return Markup(
        "".join(child if isinstance(child, Markup) else escape(child) for child in children)
    )


def _attribute(key: str, value: str | float) -> str:
    text = value if isinstance(value, str) else number(value)
    return f' {key.rstrip("_").replace("_", "-")}="{escape(text)}"'


def number(value: float) -> str:
    """Format a coordinate with at most one decimal; -0.0 becomes 0."""
    # More decimals would be less than a pixel, and more bytes.
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
