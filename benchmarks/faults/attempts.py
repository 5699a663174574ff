"""The contract of a campaign: one attempt per target and seed, with one of three outcomes."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Literal, Protocol

Outcome = Literal["survived", "refused", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("survived", "refused", "failed")
"""The right result; exit code 2 with a sentence that names the cause; everything else."""


@dataclass(frozen=True)
class Attempt:
    """One fault and what became of it."""

    campaign: str
    target: str
    seed: int
    outcome: Outcome
    detail: str
    """The fault and the message, in one line."""
    seconds: float


class Campaign(Protocol):
    """A kind of fault, to which each target is exposed. Created without arguments.

    Attempts depend on the target and the seed only, and leave neither processes nor threads.
    """

    @property
    def name(self) -> str: ...

    @property
    def targets(self) -> Sequence[str]: ...

    def prepare(self, folder: Path) -> None:
        """Make the valid files and the undisturbed results in `folder`, unless they are there.

        It is called in one process first, then in each worker, before its first attempt.
        """

    def attempt(self, target: str, seed: int, folder: Path) -> Attempt:
        """Expose a target to a fault, in an empty folder that is removed afterwards."""


def deal(targets: Sequence[str], number: int) -> Iterator[tuple[str, int]]:
    """Yield targets in turns, each with the seeds from 0 on."""
    return islice(((target, seed) for seed in count() for target in targets), number)


def interleave(
    dealt: Mapping[str, Sequence[tuple[str, int]]],
) -> Iterator[tuple[str, str, int]]:
    """Yield campaign, target and seed so that all campaigns end at about the same time."""
    shares = (
        ((number + 0.5) / len(attempts), campaign, target, seed)
        for campaign, attempts in dealt.items()
        for number, (target, seed) in enumerate(attempts)
    )
    return ((campaign, target, seed) for _, campaign, target, seed in sorted(shares))


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that is removed afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
