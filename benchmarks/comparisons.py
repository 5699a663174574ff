"""`python -m benchmarks comparisons`: compare fitted ensembles, as `infer compare` does."""

from pathlib import Path

from benchmarks.accuracy import CHOSEN_MARK
from benchmarks.record import Row, print_and_append
from benchmarks.settings import ComparisonsSettings
from infer.ensemble.blends.artifact import Scorer, open_scorer
from infer.ensemble.scoring.chosen import choices
from infer.ensemble.scoring.compare import compare_sides


def comparisons(settings: ComparisonsSettings) -> None:
    """Run `benchmarks comparisons`, which its settings describe."""
    first = open_scorer(settings.first)
    for path in settings.second:
        row = compare_pair(first, open_scorer(path), settings.data, settings.draws)
        print_and_append("comparisons", [{"data": settings.label, **row}], settings.results)


def compare_pair(first: Scorer, second: Scorer, data: Path, num_draws: int) -> Row:
    """Return the names and out-of-fold scores of two ensembles, and their comparison."""
    return {
        "first": _name(first),
        "second": _name(second),
        "first_pauc": _pauc(first),
        "second_pauc": _pauc(second),
        **compare_sides([first], [second], data, num_draws).row(),
    }


def _name(scorer: Scorer) -> str:
    mark = CHOSEN_MARK if choices(scorer.manifest) else ""
    return f"{scorer.root.name}{mark}"


def _pauc(scorer: Scorer) -> float:
    return round(float(scorer.manifest["scores"]["pauc"]), 4)
