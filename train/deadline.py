"""The time limit of a run: it ends before the epoch that would exceed it."""

import math
import time
from collections.abc import Callable, Sequence

from isic.layout import Fold
from train import distributed
from train.config import TrainSettings

# A number that no other end has, so that a script can start the command again.
OUT_OF_TIME = 75
"""Exit code of a run that is to be continued: EX_TEMPFAIL of sysexits.h."""


class OutOfTime(Exception):
    """The next epoch would exceed the time limit; the epochs before it are saved."""

    def __init__(self, fold: Fold, epoch: int) -> None:
        """Name the epoch, counted from 1, that is not begun."""
        super().__init__("the next epoch would exceed the time limit")
        self.fold = fold
        self.epoch = epoch

    def describe(self, settings: TrainSettings, folds: Sequence[Fold]) -> str:
        """Return the message on how to continue; `folds` are those of the run, in its order."""
        later = folds[folds.index(self.fold) + 1 :]
        names = f"fold{'s' * (len(later) > 1)} {', '.join(map(str, later))}"
        text = (
            f"stopped before epoch {self.epoch} of fold {self.fold}, which would not end within "
            f"--max_hours {settings.max_hours}; the same command with --resume"
        )
        if not settings.force:
            return f"{text} continues" + (f", then trains {names}" if later else "")
        # With --resume a fold that an earlier run has finished is skipped.
        text += " in place of --force continues"
        return text + (f"; then train {names} with --fold and --force" if later else "")


class Deadline:
    """Times the epochs of a run and decides whether another one fits its time limit.

    The cost of an epoch, in any unit, is relative to that of others: one that validates on more
    rows takes longer.
    """

    def __init__(
        self, max_hours: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the run's clock; None: no limit."""
        self._clock = clock
        self._last = clock()
        self._end = math.inf if max_hours is None else self._last + 3600 * max_hours
        self._most_per_cost = 0.0

    def begin_fold(self) -> None:
        """Count the time from here on towards the first epoch of a fold."""
        self._last = self._clock()

    def end_epoch(self, cost: float = 1.0) -> None:
        """Count the time since the last epoch, or since the fold began, as an epoch."""
        now = self._clock()
        self._most_per_cost = max(self._most_per_cost, (now - self._last) / cost)
        self._last = now

    def allows_epoch(self, cost: float = 1.0) -> bool:
        """Return whether an epoch as slow as the slowest one fits, in all processes alike."""
        if self._end == math.inf:
            return True
        fits = self._clock() + self._most_per_cost * cost <= self._end
        return distributed.broadcast_object(fits)
