"""The expected time of a long run, for people and logs without a progress bar."""

import time

MIN_SECONDS = 10.0
"""A run that ends sooner needs no estimate."""


def duration(seconds: float) -> str:
    """Return a duration in one unit: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class TimeLeft:
    """Prints once how long the rest of a run will take, as soon as a part of it is done."""

    def __init__(self, total: float, subject: str) -> None:
        """Start the clock.

        Args:
            total: size of the run, in any unit.
            subject: begins the line, such as "export".
        """
        self._total = total
        self._subject = subject
        self._done = 0.0
        self._started = time.perf_counter()
        self._is_printed = False

    def skip(self, amount: float) -> None:
        """Leave out a part that an earlier run has done."""
        self._total -= amount

    def advance(self, amount: float = 1.0) -> None:
        """Count a part as done, and print the estimate if it is due."""
        self._done += amount
        if self._is_printed or not self._done:
            return
        seconds = time.perf_counter() - self._started
        left = seconds / self._done * (self._total - self._done)
        # The first moments include start-up, and short runs need no estimate.
        is_early = seconds < min(MIN_SECONDS, left / 10)
        if is_early or seconds + left < MIN_SECONDS or left <= 0:
            return
        print(f"{self._subject}: about {duration(left)} left", flush=True)
        self._is_printed = True
