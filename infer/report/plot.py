"""Small charts as inline SVG: axes, lines, areas and points. Colours are CSS classes, so a page restyles them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infer.report.markup import Markup, join, number, tag

Values = NDArray[np.float64]

WIDTH, HEIGHT = 360, 336
"""In CSS pixels, about the size at which a chart is shown on a phone and on a wide screen: its text is then 12 px."""
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 10, 48

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """One direction of a chart."""

    label: str
    low: float = 0.0
    high: float = 1.0
    ticks: Sequence[float] = (0, 0.2, 0.4, 0.6, 0.8, 1)
    log: bool = False

    def place(self, values: ArrayLike) -> Values:
        """Returns where values lie, 0 at `low` and 1 at `high`; what lies outside is put on the edge."""
        at = np.clip(np.asarray(values, dtype=np.float64), self.low, self.high)
        if self.log:
            return np.asarray(np.log(at / self.low) / np.log(self.high / self.low))
        return np.asarray((at - self.low) / (self.high - self.low))

    def invert(self, places: ArrayLike) -> Values:
        """Returns the values at places in [0, 1]."""
        at = np.asarray(places, dtype=np.float64)
        if self.log:
            return np.asarray(self.low * (self.high / self.low) ** at)
        return np.asarray(self.low + at * (self.high - self.low))

    def write(self, tick: float) -> str:
        """Returns a tick's text: small powers of ten as such, which are short."""
        if self.log and tick < 0.01:
            return "10" + str(round(np.log10(tick))).translate(SUPERSCRIPT)
        return f"{tick:g}"


@dataclass(frozen=True)
class Plot:
    """A chart with axes; its methods return marks in its coordinates, `draw` puts them together."""

    x: Axis
    y: Axis
    label: str
    """What a screen reader says of it."""

    def at(self, x: ArrayLike, y: ArrayLike) -> Values:
        """Returns [N, 2] pixels."""
        right = LEFT + self.x.place(x) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - self.y.place(y) * (HEIGHT - TOP - BOTTOM)
        return np.stack(np.broadcast_arrays(right, down), axis=-1).reshape(-1, 2)

    def line(self, x: ArrayLike, y: ArrayLike, class_: str, title: str = "") -> Markup:
        """A line through N points; `title` shows under the pointer."""
        return tag("path", *_title(title), d=path(self.at(x, y)), class_=f"line {class_}")

    def area(self, x: ArrayLike, y: ArrayLike, class_: str, title: str = "") -> Markup:
        """A filled polygon."""
        return tag("path", *_title(title), d=path(self.at(x, y)) + "Z", class_=f"area {class_}")

    def dot(self, x: float, y: float, class_: str, title: str) -> Markup:
        ((right, down),) = self.at(x, y)
        return tag("circle", tag("title", title), cx=right, cy=down, r=4, class_=f"dot {class_}")

    def note(
        self, x: float, y: float, text: str, anchor: str = "start", lower: float = 0.0
    ) -> Markup:
        """Text at a point, `lower` pixels under it."""
        ((right, down),) = self.at(x, y)
        return tag("text", text, x=right, y=down + lower, text_anchor=anchor, class_="note")

    def draw(self, *marks: Markup) -> Markup:
        """Returns the SVG: grid and ticks, the marks, and the axes' labels."""
        middle = (TOP + HEIGHT - BOTTOM) / 2
        return tag(
            "svg",
            *(self._x_tick(value) for value in self.x.ticks),
            *(self._y_tick(value) for value in self.y.ticks),
            *marks,
            tag(
                "text",
                self.x.label,
                x=(LEFT + WIDTH - RIGHT) / 2,
                y=HEIGHT - 6,
                text_anchor="middle",
            ),
            tag(
                "text",
                self.y.label,
                transform=f"translate(12 {number(middle)}) rotate(-90)",
                text_anchor="middle",
            ),
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            aria_label=self.label,
            class_="plot",
        )

    def _x_tick(self, value: float) -> Markup:
        ((right, _),) = self.at(value, self.y.low)
        rule = tag("path", d=f"M{number(right)} {TOP}V{HEIGHT - BOTTOM}", class_="grid")
        return join(
            rule,
            tag("text", self.x.write(value), x=right, y=HEIGHT - BOTTOM + 20, text_anchor="middle"),
        )

    def _y_tick(self, value: float) -> Markup:
        ((_, down),) = self.at(self.x.low, value)
        rule = tag("path", d=f"M{LEFT} {number(down)}H{WIDTH - RIGHT}", class_="grid")
        return join(
            rule, tag("text", self.y.write(value), x=LEFT - 6, y=down + 4, text_anchor="end")
        )


def _title(text: str) -> list[Markup]:
    return [tag("title", text)] if text else []


def path(points: Values) -> str:
    """Returns path data through [N, 2] pixels, rounded to a tenth; points that change nothing are left out."""
    rounded = np.round(points, 1)
    moved = np.append(True, (rounded[1:] != rounded[:-1]).any(axis=1))
    rounded = rounded[moved]
    if len(rounded) > 2:
        straight = (rounded[2:] == rounded[1:-1]) & (rounded[1:-1] == rounded[:-2])
        rounded = rounded[np.concatenate([[True], ~straight.any(axis=1), [True]])]
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in rounded.tolist())


def stairs(x: ArrayLike, y: ArrayLike) -> tuple[Values, Values]:
    """Returns the corners of a step function: from x[i-1] to x[i] it has the value y[i].

    Args:
        x, y: [N].

    Returns:
        Two arrays [2N - 1].
    """
    across, up = np.repeat(np.asarray(x, np.float64), 2), np.repeat(np.asarray(y, np.float64), 2)
    return across[:-1], up[1:]


def decades(low: float) -> tuple[float, ...]:
    """Returns the powers of ten from `low`, itself one, to 1."""
    return tuple(10.0**power for power in range(round(np.log10(low)), 1))
