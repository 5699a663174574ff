"""Charts of a patient's lesions: a map of the body, and a scatter of their embeddings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.report.curves import pca
from infer.report.figures import MAP_SIDE, map_pixels
from isic.arrays import Floats
from isic.features.outlier import patient_lof
from isic.html.markup import Markup, number, tag
from isic.html.page import figure, percent

BODY_WIDTH, BODY_HEIGHT = 300, 260


@dataclass(frozen=True)
class Region:
    """A part of the body in the drawing, in its pixels."""

    left: float
    top: float
    width: float
    height: float

    def at(self, across: Floats, down: Floats) -> Floats:
        """Return the pixels [n, 2] of places in [0, 1] within the region."""
        inset = 5.0
        x = self.left + inset + across * (self.width - 2 * inset)
        y = self.top + inset + down * (self.height - 2 * inset)
        return np.stack([x, y], axis=1)


# The patient faces the reader, so that the left arm is on the right; the back is drawn beside it.
REGIONS = {
    "Head & Neck": Region(72, 8, 46, 46),
    "Right Arm": Region(18, 62, 28, 104),
    "Torso Front": Region(52, 60, 86, 96),
    "Left Arm": Region(144, 62, 28, 104),
    "Right Leg": Region(52, 162, 40, 92),
    "Left Leg": Region(98, 162, 40, 92),
    "Torso Back": Region(200, 60, 86, 96),
}
"""By the values of tbp_lv_location_simple."""
MARK_RADIUS = 6.5
MOST_STEPS = 200
OUTLYING = -1.5
"""Negative local outlier factor below which a lesion is marked."""
MOST_MARKED = 10


def body_figure(metadata: pl.DataFrame, ranked: Mapping[int, int]) -> Markup:
    """A patient's lesions on a drawing of the body.

    Args:
        metadata: [n] the patient's lesions.
        ranked: number on the page by place of a lesion, of those that are linked.
    """
    places, num_unknown = _body_pixels(metadata)
    parts = [
        tag(
            "rect",
            x=region.left,
            y=region.top,
            width=region.width,
            height=region.height,
            rx=12,
            class_="region",
        )
        for region in REGIONS.values()
    ]
    back = REGIONS["Torso Back"]
    label = tag("text", "back", x=back.left + back.width / 2, y=back.top - 6, text_anchor="middle")
    others = {place: at for place, at in places.items() if place not in ranked}
    dots = tag("path", d=_dots(others.values()) or None, class_="benign")
    marks = _marks(places, ranked, BODY_WIDTH, BODY_HEIGHT)
    chart = tag(
        "svg",
        *parts,
        label,
        dots,
        *marks,
        viewBox=f"0 0 {BODY_WIDTH} {BODY_HEIGHT}",
        role="group",
        aria_label=f"{len(places)} lesions by location, {len(marks)} of them numbered",
        class_="body",
    )
    caption = "Numbers as on this page; left and right are the patient's own."
    if num_unknown:
        caption += f" Lesions without a known location: {num_unknown:,}."
    return figure("Where the lesions are", chart, caption)


def _body_pixels(metadata: pl.DataFrame) -> tuple[dict[int, tuple[float, float]], int]:
    """Return the pixels of lesions by place, and the number without a known location."""
    name = "tbp_lv_location_simple"
    column = metadata[name].to_list() if name in metadata.columns else [None] * len(metadata)
    found: dict[int, tuple[float, float]] = {}
    for region_name, region in REGIONS.items():
        rows = [row for row, value in enumerate(column) if value == region_name]
        if rows:
            part = metadata[rows]
            pixels = region.at(_spread(part, "tbp_lv_x"), 1 - _spread(part, "tbp_lv_y"))
            found |= {row: (x, y) for row, (x, y) in zip(rows, pixels.tolist(), strict=True)}
    return found, len(column) - len(found)


def _spread(rows: pl.DataFrame, name: str) -> Floats:
    """Return [n] places in [0, 1] by a coordinate; evenly spaced in the order of rows without."""
    evenly = (np.arange(len(rows)) + 0.5) / len(rows)
    if name not in rows.columns or rows[name].null_count():
        return evenly if name == "tbp_lv_y" else np.full(len(rows), 0.5)
    values = rows[name].to_numpy()
    width = np.ptp(values)
    return (values - values.min()) / width if width > 0 else np.full(len(rows), 0.5)


def embedding_figure(features: NDArray[np.floating], ranked: Mapping[int, int]) -> Markup:
    """A patient's lesions on two principal components of their embeddings, outliers marked.

    Args:
        features: [n, D], NaN in the rows of unreadable images.
        ranked: as for `body_figure`.
    """
    usable = np.flatnonzero(np.isfinite(features).all(axis=1))
    projection = pca(features[usable])
    pixels = dict(zip(usable.tolist(), map_pixels(projection.points).tolist(), strict=True))
    outlying = [int(usable[row]) for row in find_outliers(features[usable])]
    rings = [
        tag("circle", cx=pixels[place][0], cy=pixels[place][1], r=7, class_="outlier")
        for place in outlying
    ]
    others = [at for place, at in pixels.items() if place not in ranked]
    marks = _marks(pixels, ranked, MAP_SIDE, MAP_SIDE)
    chart = tag(
        "svg",
        tag("path", d=_dots(others) or None, class_="benign"),
        *rings,
        *marks,
        viewBox=f"0 0 {MAP_SIDE} {MAP_SIDE}",
        role="group",
        aria_label=f"{len(usable)} lesions by their embeddings, {len(outlying)} outliers",
        class_="map",
    )
    first, second = projection.explained
    caption = (
        f"Near dots look alike to the network; rings mark {len(outlying)} outliers among this "
        f"patient's lesions. {percent(first)} and {percent(second)} of the variance."
    )
    return figure("How the lesions look to the network", chart, caption)


def find_outliers(features: NDArray[np.floating]) -> list[int]:
    """Return the rows that lie far from their neighbours, the furthest first."""
    if not len(features):
        return []
    deviation = features.std(axis=0)
    normalised = (features - features.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    factor = patient_lof(normalised.astype(np.float32), np.zeros(len(features), np.int64))
    order = np.argsort(factor, kind="stable")[:MOST_MARKED]
    return [int(row) for row in order if factor[row] < OUTLYING]


def _dots(places: Iterable[Sequence[float]]) -> str:
    # A line of no length with round ends is a dot.
    return "".join(f"M{number(x)} {number(y)}h0" for x, y in places)


def _marks(
    places: Mapping[int, Sequence[float]], ranked: Mapping[int, int], width: float, height: float
) -> list[Markup]:
    """Return a number per ranked place that links to its lesion, beside its dot if they overlap."""
    known = [place for place in places if place in ranked]
    dots = np.array([places[place] for place in known]).reshape(-1, 2)
    apart = keep_apart(dots, 2 * MARK_RADIUS + 1, width, height)
    return [
        _mark(ranked[place], dot, at)
        for place, dot, at in zip(known, dots.tolist(), apart.tolist(), strict=True)
    ]


def keep_apart(points: Floats, distance: float, width: float, height: float) -> Floats:
    """Move points [n, 2] of a picture until they have a distance, as far as there is room."""
    moved = points + np.arange(len(points))[:, None] * [1e-3, 2e-3]  # equal points part too
    low, high = np.full(2, distance / 2), np.array([width, height]) - distance / 2
    for _ in range(MOST_STEPS):
        between = moved[:, None] - moved[None]
        length = np.linalg.norm(between, axis=2) + np.eye(len(points)) * distance
        missing = np.maximum(distance - length, 0)
        if not missing.any():
            break
        moved = moved + (between / length[..., None] * missing[..., None] / 2).sum(axis=1)
        moved = moved.clip(low, high)
    return moved


def _mark(label: int, dot: Sequence[float], at: Sequence[float]) -> Markup:
    x, y = at
    stem = f"M{number(dot[0])} {number(dot[1])}L{number(x)} {number(y)}"
    return tag(
        "a",
        tag("title", f"lesion {label}"),
        tag("path", d=stem, class_="stem"),
        tag("circle", cx=x, cy=y, r=MARK_RADIUS, class_="mark"),
        tag("text", str(label), x=x, y=y + 2.5, text_anchor="middle", class_="mark"),
        href=f"#lesion-{label}",
    )
