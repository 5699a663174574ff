"""The error that a user can cause and fix, warnings, and hints at misspelt names."""

import sys
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache


class UserError(ValueError):
    """A problem that the user can fix; the message is one sentence with the cause and the fix.

    Commands print it and exit with code 2. Any other exception that leaves a command is a bug.
    """


def warn(message: str) -> None:
    """Print a warning to standard error."""
    print(f"warning: {message}", file=sys.stderr)


@cache
def warn_once(message: str) -> None:
    """Print a warning the first time only, however often the same file is read."""
    warn(message)


def first_line(error: BaseException, default: str = "") -> str:
    """Return the first line of an error's message; without one `default` or its type's name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else default or type(error).__name__


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
