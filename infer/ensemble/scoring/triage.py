"""Number needed to triage: lesions that a physician looks at per malignant one that is found."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infer.ensemble.blends.ranks import Scores
from isic.metrics import NUM_RESAMPLES, bootstrap_triage, triage

TRIAGE = "triage"
"""Key of `summarise_triage` among the metrics of a blend."""
SENSITIVITIES = (0.8, 0.9, 0.95)
"""Shares of the malignant lesions that are to be found."""


def summarise_triage(
    target: NDArray[np.integer], score: Scores, patient: NDArray[Any]
) -> dict[str, dict[str, float]]:
    """Return the number needed to triage by sensitivity, in JSON's types.

    Args:
        target, score, patient: [N] each.

    Returns:
        By sensitivity: the `threshold` of the scores, the `lesions` at or above it, the `malignant`
        ones among these, `number_needed` = lesions / malignant, and `low` to `high`, its 95 %
        interval over resamples of the patients.
    """
    draws = bootstrap_triage(target, score, patient, SENSITIVITIES, NUM_RESAMPLES)
    found = {}
    for sensitivity, drawn in zip(SENSITIVITIES, draws.T, strict=True):
        chosen = triage(target, score, sensitivity)
        low, high = np.percentile(drawn, [2.5, 97.5])
        found[str(sensitivity)] = {
            "threshold": chosen.threshold,
            "lesions": chosen.num_lesions,
            "malignant": chosen.num_malignant,
            "number_needed": chosen.number_needed,
            "low": float(low),
            "high": float(high),
        }
    return found


def format_triage(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return lines of text on the summaries that have TRIAGE; none if there are none."""
    known = {name: summary[TRIAGE] for name, summary in rows.items() if TRIAGE in summary}
    if not known:
        return []
    width = max(map(len, known))
    columns = "".join(f"{f'at {float(value):.0%} sensitivity':>24}" for value in SENSITIVITIES)
    lines = ["lesions to look at per malignant one found (95 % interval):"]
    lines.append(f"{'':{width}}{columns}")
    for name, found in known.items():
        cells = "".join(f"{_cell(at):>24}" for at in found.values())
        lines.append(f"{name:{width}}{cells}")
    return lines


def _cell(at: Mapping[str, float]) -> str:
    return f"{at['number_needed']:.1f} ({at['low']:.1f} to {at['high']:.1f})"
