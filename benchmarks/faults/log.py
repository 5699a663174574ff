"""The log of finished attempts, one JSON object per line, from which a run resumes."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.faults.attempts import OUTCOMES, Attempt
from benchmarks.record import Row
from benchmarks.settings import ALL
from isic.runtime.errors import UserError
from isic.runtime.files import read_text


def read_log(path: Path) -> list[Attempt]:
    """Read the attempts of earlier runs; a last line that was not written whole is dropped.

    Raises:
        UserError: the file is something else.
    """
    if not path.exists():
        return []
    text = read_text(path)
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    try:
        return [Attempt(**json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError):
        raise UserError(f"{path} is no log of attempts; choose another --work_dir") from None


def append_log(path: Path, attempt: Attempt) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(attempt)) + "\n")


def count_outcomes(attempts: Iterable[Attempt]) -> list[Row]:
    """Return a row per campaign and target, and one of all targets of each campaign.

    It has the number of attempts, how many of each outcome there are, and their seconds.
    """
    kinds = defaultdict(list)
    for attempt in attempts:
        for target in (attempt.target, ALL):
            kinds[attempt.campaign, target].append(attempt)
    return [_row(*key, kinds[key]) for key in sorted(kinds)]


def _row(campaign: str, target: str, attempts: Sequence[Attempt]) -> Row:
    counts = Counter(attempt.outcome for attempt in attempts)
    return {
        "campaign": campaign,
        "target": target,
        "attempts": len(attempts),
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "seconds": round(sum(attempt.seconds for attempt in attempts), 1),
    }
