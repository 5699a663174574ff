"""Read the charts of a page: the points of a line or an area in the units of its axes."""

import re

import numpy as np
from numpy.typing import NDArray

from isic.html.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH


def chart(page: str, title: str) -> str:
    return page.partition(f"<h3>{title}</h3>")[2].partition("</figure>")[0]


def drawn(chart: str, class_: str, y_low: float = 0.0) -> NDArray[np.float64]:
    """The last path of a class in the units of its axes, [N, 2]."""
    data = re.findall(rf'd="M([^"]*?)Z?" class="(?:line|area) {class_}"', chart)[-1]
    x, y = np.array([point.split() for point in data.split("L")], dtype=float).T
    right, up = (x - LEFT) / (WIDTH - LEFT - RIGHT), (HEIGHT - BOTTOM - y) / (HEIGHT - TOP - BOTTOM)
    return np.stack([right, y_low + up * (1 - y_low)], axis=1)


def polygon_area(points: NDArray[np.float64]) -> float:
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)
