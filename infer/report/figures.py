"""The report's charts: out-of-fold scores in, figures out."""

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from infer.report.curves import (
    Labels,
    Projection,
    Reliability,
    Values,
    precision_recall,
    roc,
    scored_region,
)
from infer.report.markup import Markup, number, tag
from infer.report.page import percent
from infer.report.plot import Axis, Plot, decades, stairs
from isic import schema
from isic.metrics import MIN_TPR, pauc, roc_auc

RARE = 0.05
"""Share of malignant lesions under which probabilities are drawn on a logarithmic axis."""
LOWEST = 1e-6
"""The lower end of such an axis, at most."""
NUM_BARS = 24
MAP_SIDE, MAP_MARGIN = 200, 8

Curve = Callable[[Labels, Values], tuple[Values, Values]]

FPR = Axis("false-positive rate")
TPR = Axis("true-positive rate")


def figure(title: str, chart: Markup, *caption: str) -> Markup:
    """Returns a chart with its title above and its explanation below."""
    return tag("figure", tag("h3", title), chart, tag("figcaption", *caption))


def roc_figure(oof: pl.DataFrame) -> Markup:
    """The whole curve, a thin one for each fold."""
    target, score = _arrays(oof)
    value = pauc(target, score)
    plot = Plot(FPR, TPR, f"ROC curve. Partial AUC {value:.4f}, AUC {roc_auc(target, score):.4f}.")
    band = plot.area([0, 1, 1, 0], [MIN_TPR, MIN_TPR, 1, 1], "band")
    chance = plot.line([0, 1], [0, 1], "chance", "chance")
    note = plot.note(0.985, MIN_TPR, f"pAUC {value:.4f}", "end", lower=18)
    chart = plot.draw(band, _region(plot, target, score), chance, *_lines(plot, oof, roc), note)
    explained = "Filled: what the challenge scores, the area under the curve and above a true-positive rate of 80 %."
    return figure("ROC", chart, explained)


def region_figure(oof: pl.DataFrame) -> Markup:
    """The scored region alone."""
    target, score = _arrays(oof)
    tpr = Axis(TPR.label, MIN_TPR, 1, (0.8, 0.85, 0.9, 0.95, 1))
    plot = Plot(
        FPR,
        tpr,
        f"The scored part of the ROC curve, true-positive rate 0.8 to 1, area {pauc(target, score):.4f}.",
    )
    chart = plot.draw(_region(plot, target, score), *_lines(plot, oof, _above))
    explained = (
        f"The area is {pauc(target, score):.4f} of at most 0.2. Thin lines: each fold alone."
    )
    return figure("The scored part", chart, explained)


def _region(plot: Plot, target: Labels, score: Values) -> Markup:
    return plot.area(
        *scored_region(*roc(target, score)), "scored", f"pAUC {pauc(target, score):.4f}"
    )


def _above(target: Labels, score: Values) -> tuple[Values, Values]:
    """The part of the curve that bounds the scored region."""
    fpr, tpr = scored_region(*roc(target, score))
    return fpr[:-1], tpr[:-1]


def _lines(plot: Plot, oof: pl.DataFrame, curve: Curve) -> list[Markup]:
    """A thin line for each fold with both classes, a thick one for all."""
    lines = []
    for (fold,), rows in sorted(oof.group_by("fold")):
        target, score = _arrays(rows)
        if target.min() < target.max():
            lines.append(
                plot.line(
                    *curve(target, score), "part", f"fold {fold}: pAUC {pauc(target, score):.4f}"
                )
            )
    return [*lines, plot.line(*curve(*_arrays(oof)), "whole", "all folds pooled")]


def precision_recall_figure(oof: pl.DataFrame) -> Markup:
    target, score = _arrays(oof)
    recall, precision, average = precision_recall(target, score)
    share = float(target.mean())
    plot = Plot(
        Axis("recall (true-positive rate)"),
        Axis("precision"),
        f"Precision by recall, average {average:.4f}.",
    )
    chance = plot.line([0, 1], [share, share], "chance", "chance: the share of malignant lesions")
    chart = plot.draw(chance, plot.line(*stairs(recall, precision), "whole"))
    explained = f"Average precision {average:.4f}; chance is the share of malignant lesions, {percent(share)} (dotted)."
    return figure("Precision and recall", chart, explained)


def reliability_figure(oof: pl.DataFrame, bins: Reliability) -> Markup:
    """Observed shares by mean score, with 95 % intervals."""
    target, score = _arrays(oof)
    low = _lowest(target, min(bins.mean_score.min(), bins.observed[bins.observed > 0].min()))
    plot = Plot(
        _probability("mean score of the bin", low),
        _probability("share that is malignant", low),
        "Calibration.",
    )
    marks = [mark for number in range(len(bins.num_rows)) for mark in _bin(plot, bins, number)]
    chart = plot.draw(plot.line([low, 1], [low, 1], "chance", "perfectly calibrated"), *marks)
    explained = (
        "Dots on the dotted line would mean that scores are frequencies. Each holds an equal part of the malignant "
        "lesions that the scores promise; bars hold 95 % of redraws of the patients. "
        f"Mean score {percent(float(score.mean()))}, malignant {percent(float(target.mean()))}."
    )
    return figure("Calibration", chart, explained)


def _bin(plot: Plot, bins: Reliability, index: int) -> list[Markup]:
    mean, observed = float(bins.mean_score[index]), float(bins.observed[index])
    title = f"{bins.num_rows[index]:,} lesions: mean score {percent(mean)}, malignant {percent(observed)}"
    bar = plot.line([mean, mean], [bins.low[index], bins.high[index]], "bar")
    return [bar, plot.dot(mean, observed, "whole", title)]


def distribution_figure(oof: pl.DataFrame) -> Markup:
    """Histograms of the scores of both classes."""
    target, score = _arrays(oof)
    axis = _probability("score", _lowest(target, float(np.quantile(score, 0.01))))
    places = axis.place(score)
    edges = np.linspace(0, 1, NUM_BARS + 1)
    shares = [
        np.histogram(places[target == label], edges)[0] / max((target == label).sum(), 1)
        for label in (0, 1)
    ]
    top = float(np.max(shares))
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if top <= 5 * step)
    up = Axis(
        "share of the class",
        0,
        max(top, step),
        tuple(step * k for k in range(int(top / step + 1e-9) + 1)),
    )
    plot = Plot(axis, up, "Histograms of the scores of benign and malignant lesions.")
    across = axis.invert(edges)
    marks = [
        plot.area(*_outline(across, share), class_, title)
        for share, class_, title in zip(
            shares, ("benign", "malignant"), ("benign", "malignant"), strict=True
        )
    ]
    key = (
        tag("span", "malignant", class_="key malignant"),
        tag("span", "benign", class_="key benign"),
    )
    return figure("Where the scores lie", plot.draw(*marks), *key, "Each adds up to 1.")


def _outline(edges: Values, shares: Values) -> tuple[Values, Values]:
    """The corners of a histogram's bars, from the floor and back to it."""
    return np.repeat(edges, 2), np.concatenate([[0.0], np.repeat(shares, 2), [0.0]])


def _lowest(target: Labels, smallest: float) -> float:
    """Where an axis of probabilities begins: 0, or a power of ten under `smallest` where malignancy is rare."""
    if target.mean() > RARE:
        return 0.0
    return float(10.0 ** np.floor(np.log10(np.clip(smallest, LOWEST, RARE))))


def _probability(label: str, low: float) -> Axis:
    return Axis(label, low, 1, decades(low), log=True) if low else Axis(label)


def map_figure(fold: int, projection: Projection, ids: Sequence[str], target: Labels) -> Markup:
    """A fold's embeddings on their first two principal components; malignant lesions lie above the others."""
    places, malignant = _spread(projection.points), target == 1
    benign = "".join(
        f"M{number(right)} {number(down)}h0" for right, down in places[~malignant].tolist()
    )
    dots = [
        tag("circle", tag("title", name), cx=right, cy=down, r=2.6, class_="malignant")
        for name, (right, down) in zip(
            np.asarray(ids)[malignant].tolist(), places[malignant].tolist(), strict=True
        )
    ]
    chart = tag(
        "svg",
        tag("path", d=benign or None, class_="benign"),
        *dots,
        viewBox=f"0 0 {MAP_SIDE} {MAP_SIDE}",
        role="img",
        aria_label=f"Fold {fold}: {(~malignant).sum()} benign and {malignant.sum()} malignant lesions",
        class_="map",
    )
    first, second = projection.explained
    return figure(f"Fold {fold}", chart, f"{percent(first)} and {percent(second)} of the variance")


def _spread(points: Values) -> Values:
    """Returns pixels: the middle 99 % fill the map, what lies further out is put on its edge."""
    low, high = np.quantile(points, [0.005, 0.995], axis=0)
    width = np.where(high > low, high - low, 1.0)
    places = np.where(high > low, np.clip((points - low) / width, -0.04, 1.04), 0.5)
    inside = MAP_SIDE - 4 * MAP_MARGIN
    return np.asarray(2 * MAP_MARGIN + places * inside * [1, -1] + [0, inside])


def _arrays(oof: pl.DataFrame) -> tuple[Labels, Values]:
    return oof[schema.TARGET].to_numpy(), oof["blend"].to_numpy()
