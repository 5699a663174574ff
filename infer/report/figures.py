"""The report's charts: out-of-fold scores in, figures out."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.report.curves import Projection, Reliability, precision_recall
from isic import schema
from isic.arrays import Floats, Labels
from isic.html.markup import Markup, number, tag
from isic.html.page import figure, percent
from isic.html.plot import Axis, Plot, decades, stairs
from isic.html.roc import LabelledScores, roc_chart, scored_region_chart
from isic.metrics import pauc

RARE = 0.05
"""Share of malignant lesions below which probabilities are drawn on a logarithmic axis."""
LOWEST = 1e-6
"""Smallest lower end of such an axis."""
NUM_BARS = 24
GRID_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Distances of grid lines to choose from."""
MAX_GRID_LINES = 5
MAP_SIDE = 200
MAP_MARGIN = 8


def roc_figure(oof: pl.DataFrame) -> Markup:
    """The pooled ROC curve, and a thin one per fold."""
    chart = roc_chart(_curves(oof))
    explained = (
        "Filled: the region that the challenge scores, under the curve and above a "
        "true-positive rate of 80 %."
    )
    return figure("ROC", chart, explained)


def region_figure(oof: pl.DataFrame) -> Markup:
    """The scored region only."""
    value = pauc(*_arrays(oof))
    explained = f"The area is {value:.4f} of at most 0.2. Thin lines: each fold by itself."
    return figure("The scored part", scored_region_chart(_curves(oof)), explained)


def _curves(oof: pl.DataFrame) -> dict[str, LabelledScores]:
    by_fold = {f"fold {fold}": _arrays(rows) for (fold,), rows in sorted(oof.group_by("fold"))}
    return {**by_fold, "all folds pooled": _arrays(oof)}


def precision_recall_figure(oof: pl.DataFrame) -> Markup:
    """Precision by recall."""
    target, score = _arrays(oof)
    recall, precision, average = precision_recall(target, score)
    base_rate = float(target.mean())
    plot = Plot(
        Axis("recall (true-positive rate)"),
        Axis("precision"),
        f"Precision by recall, average {average:.4f}.",
    )
    chance = plot.line(
        [0, 1], [base_rate, base_rate], "chance", "chance: the share of malignant lesions"
    )
    chart = plot.draw(chance, plot.line(*stairs(recall, precision), "whole"))
    explained = (
        f"Average precision {average:.4f}; chance is the share of malignant lesions, "
        f"{percent(base_rate)} (dotted)."
    )
    return figure("Precision and recall", chart, explained)


def reliability_figure(oof: pl.DataFrame, bins: Reliability, title: str = "Calibration") -> Markup:
    """Observed shares by mean score, with 95 % intervals."""
    target, score = _arrays(oof)
    smallest = min(bins.mean_score.min(), bins.observed[bins.observed > 0].min())
    low = _lowest(target, smallest)
    plot = Plot(
        _probability_axis("mean score of the bin", low),
        _probability_axis("share that is malignant", low),
        "Calibration.",
    )
    marks = [mark for index in range(len(bins.num_rows)) for mark in _bin_marks(plot, bins, index)]
    chart = plot.draw(plot.line([low, 1], [low, 1], "chance", "perfectly calibrated"), *marks)
    explained = (
        "If scores were frequencies, the dots would be on the dotted line. Each dot holds an equal "
        "part of the malignant lesions that the scores predict; bars hold 95 % of the resamples of "
        f"the patients. Mean score {percent(float(score.mean()))}, "
        f"malignant {percent(float(target.mean()))}."
    )
    return figure(title, chart, explained)


def _bin_marks(plot: Plot, bins: Reliability, index: int) -> list[Markup]:
    mean = float(bins.mean_score[index])
    observed = float(bins.observed[index])
    num_rows = bins.num_rows[index]
    title = f"{num_rows:,} lesions: mean score {percent(mean)}, malignant {percent(observed)}"
    bar = plot.line([mean, mean], [bins.low[index], bins.high[index]], "bar")
    return [bar, plot.dot(mean, observed, "whole", title)]


def distribution_figure(oof: pl.DataFrame) -> Markup:
    """Histograms of the scores of both classes."""
    target, score = _arrays(oof)
    x = _probability_axis("score", _lowest(target, float(np.quantile(score, 0.01))))
    places = x.place(score)
    edges = np.linspace(0, 1, NUM_BARS + 1)
    benign = _histogram(places[target == 0], edges)
    malignant = _histogram(places[target == 1], edges)
    y = _share_axis(float(max(benign.max(), malignant.max())))
    plot = Plot(x, y, "Histograms of the scores of benign and malignant lesions.")
    # Bars have equal widths on the axis, which may be logarithmic.
    across = x.invert(edges)
    chart = plot.draw(
        plot.area(*_outline(across, benign), "benign", "benign"),
        plot.area(*_outline(across, malignant), "malignant", "malignant"),
    )
    key = (
        tag("span", "malignant", class_="key malignant"),
        tag("span", "benign", class_="key benign"),
    )
    return figure("Distribution of the scores", chart, *key, "Each adds up to 1.")


def _histogram(places: Floats, edges: Floats) -> Floats:
    counts, _ = np.histogram(places, edges)
    return np.asarray(counts / max(len(places), 1))


def _share_axis(top: float) -> Axis:
    step = next(step for step in GRID_STEPS if top <= MAX_GRID_LINES * step)
    num_ticks = int(top / step + 1e-9) + 1  # 0.3 / 0.1 is just below 3
    ticks = tuple(step * line for line in range(num_ticks))
    return Axis("share of the class", 0, max(top, step), ticks)


def _outline(edges: Floats, shares: Floats) -> tuple[Floats, Floats]:
    """Return the corners of a histogram's bars, from the floor and back to it."""
    return np.repeat(edges, 2), np.concatenate([[0.0], np.repeat(shares, 2), [0.0]])


def _lowest(target: Labels, smallest: float) -> float:
    """Return 0, or a power of ten of at most `smallest` if malignant lesions are rare."""
    if target.mean() > RARE:
        return 0.0
    return float(10.0 ** np.floor(np.log10(np.clip(smallest, LOWEST, RARE))))


def _probability_axis(label: str, low: float) -> Axis:
    return Axis(label, low, 1, decades(low), log=True) if low else Axis(label)


def map_figure(
    title: str, projection: Projection, ids: Sequence[str], target: NDArray[np.integer]
) -> Markup:
    """A fold's embeddings on two principal components, malignant lesions above the others."""
    places = map_pixels(projection.points)
    malignant = target == 1
    # One path for all benign dots: a line of no length with round ends is a dot.
    benign_path = "".join(
        f"M{number(right)} {number(down)}h0" for right, down in places[~malignant].tolist()
    )
    malignant_ids = np.asarray(ids)[malignant].tolist()
    dots = [
        tag("circle", tag("title", name), cx=right, cy=down, r=2.6, class_="malignant")
        for name, (right, down) in zip(malignant_ids, places[malignant].tolist(), strict=True)
    ]
    counts = f"{(~malignant).sum()} benign and {malignant.sum()} malignant lesions"
    chart = tag(
        "svg",
        tag("path", d=benign_path or None, class_="benign"),
        *dots,
        viewBox=f"0 0 {MAP_SIDE} {MAP_SIDE}",
        role="img",
        aria_label=f"{title}: {counts}",
        class_="map",
    )
    first, second = projection.explained
    return figure(title, chart, f"{percent(first)} and {percent(second)} of the variance")


def map_pixels(points: Floats) -> Floats:
    """Map points [N, 2] to pixels: the middle 99 % fill the map, others are moved to its edge."""
    low, high = np.quantile(points, [0.005, 0.995], axis=0)
    varies = high > low
    width = np.where(varies, high - low, 1.0)
    places = np.where(varies, np.clip((points - low) / width, -0.04, 1.04), 0.5)
    inside = MAP_SIDE - 4 * MAP_MARGIN
    # Pixels count downwards.
    return np.asarray(2 * MAP_MARGIN + places * inside * [1, -1] + [0, inside])


def _arrays(oof: pl.DataFrame) -> LabelledScores:
    return oof[schema.TARGET].to_numpy(), oof["blend"].to_numpy()
