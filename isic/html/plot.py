"""Small charts as inline SVG: axes, lines, areas and points.

Colours are CSS classes (`plot.css`), so a page can restyle them and follow the dark mode.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from isic.arrays import Floats
from isic.html.markup import Markup, join, number, tag

PLOT_STYLE = Path(__file__).with_name("plot.css")

# About the size of a chart on a phone and on a wide screen: its text is then 12 px.
WIDTH = 360
HEIGHT = 336
"""CSS pixels."""
LEFT = 54
RIGHT = 14
TOP = 10
BOTTOM = 48
"""Margins around the axes."""
IMAGE_WIDTH = 720
"""CSS pixels of a chart in a file of its own, at most."""

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """One direction of a chart."""

    label: str
    low: float = 0.0
    high: float = 1.0
    ticks: Sequence[float] = (0, 0.2, 0.4, 0.6, 0.8, 1)
    log: bool = False

    def place(self, values: ArrayLike) -> Floats:
        """Map values to 0 (`low`) to 1 (`high`); values outside are moved to the edge."""
        clipped = np.clip(np.asarray(values, dtype=np.float64), self.low, self.high)
        if self.log:
            return np.asarray(np.log(clipped / self.low) / np.log(self.high / self.low))
        return np.asarray((clipped - self.low) / (self.high - self.low))

    def invert(self, places: ArrayLike) -> Floats:
        """Return the values at places in [0, 1]."""
        places = np.asarray(places, dtype=np.float64)
        if self.log:
            return np.asarray(self.low * (self.high / self.low) ** places)
        return np.asarray(self.low + places * (self.high - self.low))

    def tick_text(self, tick: float) -> str:
        """Format a tick; small values on a logarithmic axis become powers of ten."""
        if self.log and tick < 0.01:
            return "10" + str(round(np.log10(tick))).translate(SUPERSCRIPT)
        return f"{tick:g}"


@dataclass(frozen=True)
class Plot:
    """A chart with axes. Its methods return marks in its coordinates; `draw` assembles them."""

    x: Axis
    y: Axis
    label: str
    """Description for screen readers."""

    def at(self, x: ArrayLike, y: ArrayLike) -> Floats:
        """Return the pixels [N, 2] of points."""
        right = LEFT + self.x.place(x) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - self.y.place(y) * (HEIGHT - TOP - BOTTOM)
        right, down = np.broadcast_arrays(right, down)
        return np.stack([right, down], axis=-1).reshape(-1, 2)

    def line(self, x: ArrayLike, y: ArrayLike, class_: str, title: str = "") -> Markup:
        """A line through N points; `title` is its tooltip."""
        return tag("path", *_title(title), d=path(self.at(x, y)), class_=f"line {class_}")

    def area(self, x: ArrayLike, y: ArrayLike, class_: str, title: str = "") -> Markup:
        """A filled polygon."""
        return tag("path", *_title(title), d=path(self.at(x, y)) + "Z", class_=f"area {class_}")

    def dot(self, x: float, y: float, class_: str, title: str) -> Markup:
        ((right, down),) = self.at(x, y)
        return tag("circle", tag("title", title), cx=right, cy=down, r=4, class_=f"dot {class_}")

    def note(
        self,
        x: float,
        y: float,
        text: str,
        anchor: str = "start",
        lower: float = 0.0,
        class_: str = "whole",
    ) -> Markup:
        """Text at a point, moved down by `lower` pixels; `class_` is that of the line it names."""
        ((right, down),) = self.at(x, y)
        return tag(
            "text", text, x=right, y=down + lower, text_anchor=anchor, class_=f"note {class_}"
        )

    def draw(self, *marks: Markup) -> Markup:
        """Return the SVG: grid and ticks, the marks, and the axis labels."""
        middle = (TOP + HEIGHT - BOTTOM) / 2
        x_label = tag(
            "text", self.x.label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle"
        )
        y_label = tag(
            "text",
            self.y.label,
            transform=f"translate(12 {number(middle)}) rotate(-90)",
            text_anchor="middle",
        )
        return tag(
            "svg",
            *(self._x_tick(value) for value in self.x.ticks),
            *(self._y_tick(value) for value in self.y.ticks),
            *marks,
            x_label,
            y_label,
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            aria_label=self.label,
            class_="plot",
        )

    def _x_tick(self, value: float) -> Markup:
        ((right, _),) = self.at(value, self.y.low)
        text = self.x.tick_text(value)
        return join(
            tag("path", d=f"M{number(right)} {TOP}V{HEIGHT - BOTTOM}", class_="grid"),
            tag("text", text, x=right, y=HEIGHT - BOTTOM + 20, text_anchor="middle"),
        )

    def _y_tick(self, value: float) -> Markup:
        ((_, down),) = self.at(self.x.low, value)
        text = self.y.tick_text(value)
        return join(
            tag("path", d=f"M{LEFT} {number(down)}H{WIDTH - RIGHT}", class_="grid"),
            tag("text", text, x=LEFT - 6, y=down + 4, text_anchor="end"),
        )


def _title(text: str) -> list[Markup]:
    return [tag("title", text)] if text else []


def svg_file(chart: Markup) -> str:
    """Return the text of an SVG file: a chart of `Plot.draw` with its styles, light and dark."""
    # CSS has no characters that XML would need escaped, and a comment of it may not have any.
    style = tag("style", Markup(PLOT_STYLE.read_text(encoding="utf-8")))
    size = f' xmlns="http://www.w3.org/2000/svg" width="{IMAGE_WIDTH}">'
    return chart.replace(">", f"{size}\n{style}", 1) + "\n"


def path(points: Floats) -> str:
    """Return path data through pixels [N, 2], rounded to 0.1, without redundant points."""
    rounded = np.round(points, 1)
    differs = (rounded[1:] != rounded[:-1]).any(axis=1)
    rounded = rounded[np.append(True, differs)]
    if len(rounded) > 2:
        # A point is redundant if it and both neighbours have the same x, or the same y.
        same_as_next = rounded[1:] == rounded[:-1]
        is_redundant = (same_as_next[1:] & same_as_next[:-1]).any(axis=1)
        rounded = rounded[np.concatenate([[True], ~is_redundant, [True]])]
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in rounded.tolist())


def stairs(x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    """Return the corners of a step function that has the value y[i] from x[i-1] to x[i].

    `x` and `y` are [N], the results [2N - 1].
    """
    across = np.repeat(np.asarray(x, np.float64), 2)
    up = np.repeat(np.asarray(y, np.float64), 2)
    return across[:-1], up[1:]


def decades(low: float) -> tuple[float, ...]:
    """Return the powers of ten from `low`, itself a power of ten, to 1."""
    return tuple(10.0**power for power in range(round(np.log10(low)), 1))
