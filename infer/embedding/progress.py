"""How a run is getting on: counts, where the time goes, the bar, and when there are too many bad images."""

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from tqdm import tqdm

from infer.embedding.embedder import Step
from infer.embedding.plan import Part
from isic.runtime import interrupt
from isic.runtime.errors import UserError
from isic.runtime.machine import peak_memory_mb

OnError = Literal["raise", "skip"]


class Tally:
    """Adds up what the workers report. Use it as a context: it owns the bar."""

    def __init__(
        self, parts: Iterable[Part], on_error: OnError, max_bad: float, quiet: bool
    ) -> None:
        """Counts what is done already, bad images too.

        Raises:
            UserError: there are bad images among it that are not to be skipped, or too many.
        """
        parts = list(parts)
        self._num_planned = sum(map(len, parts))
        self._on_error, self._max_bad = on_error, max_bad
        self._reasons: Counter[str] = Counter()
        self.num_images = 0
        self.num_now = sum(len(part) for part in parts if not part.is_done)
        """Images that this run is to embed."""
        self.seconds = {"decode_wait": 0.0, "engine": 0.0, "write_wait": 0.0}
        """Of the control threads: waiting for decoded images, in the engines, waiting for the disk."""
        self._started = time.perf_counter()
        # None: no bar where standard error is not a terminal
        self._bar = tqdm(total=self._num_planned, unit="img", disable=True if quiet else None)
        for part in parts:
            if part.is_done:
                self._count(len(part), part.bad())
        self._bar.initial = self.num_images

    def __enter__(self) -> "Tally":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def total_seconds(self) -> float:
        return time.perf_counter() - self._started

    @property
    def shares(self) -> dict[str, float]:
        """Each stage's share of the control threads' time; what is missing to 1 went into Python between them."""
        busy = max(sum(self.seconds.values()), 1e-9)
        return {
            stage.removesuffix("_wait"): seconds / busy for stage, seconds in self.seconds.items()
        }

    @property
    def bound_by(self) -> str:
        """The stage that the others wait for: decode, engine or write."""
        return max(self.shares, key=self.shares.__getitem__)

    def facts(self) -> dict[str, Any]:
        """Returns what a finished run says of its speed."""
        return {
            "images_per_second": self.num_now / self.total_seconds,
            "seconds": {"total": self.total_seconds, **self.seconds},
            "wait_shares": self.shares,
            "bound_by": self.bound_by,
            "peak_memory_mb": peak_memory_mb(),
        }

    def add(self, step: Step) -> None:
        """Adds what a worker reports. Raises UserError or Interrupted where bad images or a signal end the run."""
        interrupt.raise_if_interrupted()
        self.seconds["decode_wait"] += step.decode_wait
        self.seconds["engine"] += step.engine
        self.seconds["write_wait"] += step.write_wait
        self._bar.set_postfix_str(f"bound by {self.bound_by}", refresh=False)
        self._count(step.num_images, step.bad)

    def _count(self, num_images: int, bad: list[tuple[str, str]]) -> None:
        self.num_images += num_images
        self._bar.update(num_images)
        if not bad:
            return
        self._reasons.update(reason for _, reason in bad)
        name, reason = bad[0]
        if self._on_error == "raise":
            raise UserError(
                f"{name}: {reason}; mend it, or leave such images out with --on_error skip"
            )
        num_bad = self._reasons.total()
        if num_bad > self._max_bad * self._num_planned:
            summary = ", ".join(f"{count} {why}" for why, count in self._reasons.most_common(3))
            raise UserError(
                f"{num_bad} of the first {self.num_images} images cannot be used ({summary}), such as {name}; "
                "look at the dataset with `python -m isic check`, or allow more with --max_bad"
            )
