"""Clock and batches of the benchmarks.

It imports nothing large, since each baseline chooses its own libraries.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import TypeVar

ItemT = TypeVar("ItemT")


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def batches(items: Sequence[ItemT], size: int) -> Iterator[Sequence[ItemT]]:
    """Yield consecutive slices of at most `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def repeated(items: Sequence[ItemT], number: int) -> list[ItemT]:
    """Return the first `number` items of an endless repetition of a sequence."""
    return list(islice(cycle(items), number))
