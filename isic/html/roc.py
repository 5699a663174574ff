"""ROC charts, with the region that the challenge scores: true-positive rates above 0.8."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_curve

from isic.arrays import Floats, Labels
from isic.html.markup import Markup
from isic.html.plot import Axis, Plot
from isic.metrics import MIN_TPR, above_min_tpr, pauc, roc_auc

LabelledScores = tuple[Labels, Floats]
"""Targets [N] of 0 and 1, and scores [N]."""

FPR = Axis("false-positive rate")
TPR = Axis("true-positive rate")
SCORED_TPR = Axis(TPR.label, MIN_TPR, 1, (0.8, 0.85, 0.9, 0.95, 1))
RIGHT_EDGE = 0.985
"""False-positive rate at which texts end."""
LINE_HEIGHT = 17
"""Pixels from one line of the legend to the next."""
MAX_LISTED = 10
"""Curves in the legend; of more only the last is listed."""


@dataclass(frozen=True)
class _Curve:
    title: str
    """Name and pAUC."""
    class_: str
    """CSS class of its line: `whole` is thick, `part` thin."""
    fpr: Floats
    tpr: Floats


def roc_chart(curves: Mapping[str, LabelledScores], with_legend: bool = False) -> Markup:
    """Draw ROC curves by name, and the scored region of the last one, which is thick.

    Args:
        curves: of the thin ones, those with one class only are left out.
        with_legend: list the name and the pAUC of each curve.
    """
    target, score = list(curves.values())[-1]
    value = pauc(target, score)
    drawn = _drawn(curves)
    plot = Plot(FPR, TPR, f"ROC curve. Partial AUC {value:.4f}, AUC {roc_auc(target, score):.4f}.")
    band = plot.area([0, 1, 1, 0], [MIN_TPR, MIN_TPR, 1, 1], "band")
    chance = plot.line([0, 1], [0, 1], "chance", "chance")
    lines = [plot.line(curve.fpr, curve.tpr, curve.class_, curve.title) for curve in drawn]
    if with_legend:
        notes = _legend(plot, drawn)
    else:
        notes = [plot.note(RIGHT_EDGE, MIN_TPR, f"pAUC {value:.4f}", "end", lower=18)]
    return plot.draw(band, _region(plot, drawn[-1]), chance, *lines, *notes)


def scored_region_chart(curves: Mapping[str, LabelledScores]) -> Markup:
    """Draw only the scored region of the curves of `roc_chart`."""
    drawn = _drawn(curves)
    value = pauc(*list(curves.values())[-1])
    label = f"The scored part of the ROC curve, true-positive rate 0.8 to 1, area {value:.4f}."
    plot = Plot(FPR, SCORED_TPR, label)
    lines = [
        plot.line(*above_min_tpr(curve.fpr, curve.tpr), curve.class_, curve.title)
        for curve in drawn
    ]
    return plot.draw(_region(plot, drawn[-1]), *lines)


def scored_region(fpr: Floats, tpr: Floats) -> tuple[Floats, Floats]:
    """Return the corners of the region under the curve and above TPR 0.8; its area is the pAUC."""
    fpr, tpr = above_min_tpr(fpr, tpr)
    return np.append(fpr, 1.0), np.append(tpr, MIN_TPR)


def _drawn(curves: Mapping[str, LabelledScores]) -> list[_Curve]:
    *thin, last = curves
    drawn = []
    for name in thin:
        target, score = curves[name]
        if np.ptp(target):  # a curve needs both classes
            drawn.append(_curve(name, "part", target, score))
    return [*drawn, _curve(last, "whole", *curves[last])]


def _curve(name: str, class_: str, target: Labels, score: Floats) -> _Curve:
    fpr, tpr, _ = roc_curve(target, score)
    return _Curve(f"{name}: pAUC {pauc(target, score):.4f}", class_, fpr, tpr)


def _region(plot: Plot, curve: _Curve) -> Markup:
    return plot.area(*scored_region(curve.fpr, curve.tpr), "scored", curve.title)


def _legend(plot: Plot, curves: Sequence[_Curve]) -> list[Markup]:
    """List the curves at the bottom right, which a curve better than chance never reaches."""
    listed = curves if len(curves) <= MAX_LISTED else curves[-1:]
    return [
        plot.note(
            RIGHT_EDGE, 0, curve.title, "end", lower=-10 - LINE_HEIGHT * line, class_=curve.class_
        )
        for line, curve in enumerate(reversed(listed))
    ]
