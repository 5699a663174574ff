"""The error that a user can cause and fix, warnings, and hints at misspelt names."""

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from difflib import get_close_matches
from functools import cache


class UserError(ValueError):
    """A problem that the user can fix; the message is one sentence with the cause and the fix.

    Commands print it and exit with code 2. Any other exception that leaves a command is a bug.
    """


class DiskError(UserError):
    """A file cannot be written."""


class ResultWarning(UserWarning):
    """A result may be wrong; the message says why."""


_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


@contextlib.contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Within the block, append the messages of `warn` to the list instead of printing them."""
    messages: list[str] = []
    token = _collected.set(messages)
    try:
        yield messages
    finally:
        _collected.reset(token)


@contextlib.contextmanager
def issue_warnings() -> Iterator[None]:
    """Turn the warnings of the block into Python warnings, which name the caller's line."""
    with collect_warnings() as messages:
        yield
    for message in messages:
        # Past this generator, `contextlib` and the public function.
        warnings.warn(message, ResultWarning, stacklevel=4)


def warn(message: str) -> None:
    """Print a warning to standard error."""
    collected = _collected.get()
    if collected is None:
        print(f"warning: {message}", file=sys.stderr)
    else:
        collected.append(message)


@cache
def warn_once(message: str) -> None:
    """Print a warning the first time only, however often the same file is read."""
    warn(message)


def first_line(error: BaseException, default: str = "") -> str:
    """Return the first line of an error's message; without one `default` or its type's name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else default or type(error).__name__


def first_of(values: Sequence[str], number: int, separator: str = ", ") -> str:
    """Return the first values and how many others there are: "a, b and 3 more"."""
    num_more = len(values) - number
    more = f" and {num_more:,} more" if num_more > 0 else ""
    return f"{separator.join(values[:number])}{more}"


MAX_KNOWN = 12
"""Known words that a hint lists in full."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint with the known word nearest to `name`, or all known words if none is near."""
    words = sorted(known)
    near = get_close_matches(name, words, n=1, cutoff=0.5)
    if near:
        return f'did you mean "{near[0]}"?'
    if len(words) <= MAX_KNOWN:
        return f"known are: {', '.join(words)}"
    return f'the nearest known is "{get_close_matches(name, words, n=1, cutoff=0)[0]}"'
