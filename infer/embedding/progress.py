"""Progress of an embedding run: counts, time per stage, the bar, and the limit on bad images."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal

from tqdm import tqdm

from infer.embedding.embedder import BatchStats
from infer.embedding.shards import Shard
from isic.runtime import interrupt
from isic.runtime.errors import UserError
from isic.runtime.machine import peak_memory_mb
from isic.runtime.progress import TimeLeft

OnError = Literal["raise", "skip"]


class Progress:
    """Sums up the batches that workers report; a context manager that closes the bar."""

    def __init__(
        self,
        shards: Iterable[Shard],
        on_error: OnError,
        max_bad: float,
        quiet: bool,
        watch: "Watch | None" = None,
    ) -> None:
        """Count the finished shards, with their bad images.

        Args:
            shards: of the run, the finished ones included.
            on_error: whether a bad image ends the run.
            max_bad: the share of bad images above which it ends.
            quiet: print nothing.
            watch: called after each batch.

        Raises:
            UserError: these have too many bad images, or any if `on_error` is `raise`.
        """
        shards = list(shards)
        self._num_planned = sum(map(len, shards))
        self._on_error = on_error
        self._max_bad = max_bad
        self._reasons: Counter[str] = Counter()
        self.num_images = 0
        self.num_due = sum(len(shard) for shard in shards if not shard.is_done)
        """Images that this run has to embed."""
        self.seconds = {"decode_wait": 0.0, "engine": 0.0, "write_wait": 0.0}
        """Of the control threads, per stage."""
        self._watch = watch
        self._started = time.perf_counter()
        self._first_batch: tuple[float, int] | None = None
        """The time at which the first batch was reported, and the images until then."""
        # None: no bar if standard error is not a terminal.
        self._bar = tqdm(total=self._num_planned, unit="img", disable=True if quiet else None)
        for shard in shards:
            if shard.is_done:
                self._count(len(shard), shard.read_bad())
        self._bar.initial = self.num_images
        # A bar shows the time itself.
        hides_time = quiet or not self._bar.disable
        self._time_left = None if hides_time else TimeLeft(self.num_due, "embedding")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def total_seconds(self) -> float:
        return time.perf_counter() - self._started

    @property
    def time_shares(self) -> dict[str, float]:
        """Each stage's share of the time measured in the stages."""
        # Nothing has been timed before the first batch.
        busy = max(sum(self.seconds.values()), 1e-9)
        return {
            stage.removesuffix("_wait"): seconds / busy for stage, seconds in self.seconds.items()
        }

    @property
    def bound_by(self) -> str:
        """The stage that takes the most time: decode, engine or write."""
        shares = self.time_shares
        return max(shares, key=shares.__getitem__)

    def summary(self) -> dict[str, Any]:
        """Return the fields of `run.json` about the run's speed."""
        return {
            "images_per_second": self.num_due / self.total_seconds,
            "seconds": {"total": self.total_seconds, **self.seconds},
            "wait_shares": self.time_shares,
            "bound_by": self.bound_by,
            "peak_memory_mb": peak_memory_mb(),
        }

    def add(self, stats: BatchStats) -> None:
        """Add a batch. Raise UserError for bad images and Interrupted after a signal."""
        interrupt.raise_if_interrupted()
        self.seconds["decode_wait"] += stats.decode_wait
        self.seconds["engine"] += stats.engine
        self.seconds["write_wait"] += stats.write_wait
        self._bar.set_postfix_str(f"bound by {self.bound_by}", refresh=False)
        self._count(stats.num_images, stats.bad)
        if self._time_left:
            self._time_left.advance(stats.num_images)
        if self._first_batch is None:
            self._first_batch = time.perf_counter(), self.num_images
        if self._watch:
            self._watch(self)

    @property
    def timed_seconds(self) -> float:
        """Seconds since the first batch, 0 before it."""
        return time.perf_counter() - self._first_batch[0] if self._first_batch else 0.0

    @property
    def seconds_left(self) -> float:
        """Seconds that the rest takes at the speed since the first batch, infinite until then."""
        # Without the start: networks take up to a minute to load, whatever the number of images.
        num_left = self._num_planned - self.num_images
        num_timed = self.num_images - self._first_batch[1] if self._first_batch else 0
        if not num_left:
            return 0.0
        return self.timed_seconds / num_timed * num_left if num_timed else math.inf

    def _count(self, num_images: int, bad: list[tuple[str, str]]) -> None:
        self.num_images += num_images
        self._bar.update(num_images)
        if not bad:
            return
        self._reasons.update(reason for _, reason in bad)
        name, reason = bad[0]
        if self._on_error == "raise":
            raise UserError(f"{name}: {reason}; fix it, or skip such images with --on_error skip")
        num_bad = self._reasons.total()
        # Of all planned images, not of those so far: a few bad ones at the start must not end a
        # run that is within the limit as a whole.
        if num_bad > self._max_bad * self._num_planned:
            reasons = ", ".join(f"{count} {why}" for why, count in self._reasons.most_common(3))
            raise UserError(
                f"{num_bad} of the first {self.num_images} images cannot be used ({reasons}), "
                f"such as {name}; check the dataset with `python -m isic check`, or allow more "
                "with --max_bad"
            )


Watch = Callable[[Progress], None]
"""Looks at a run after each batch."""
