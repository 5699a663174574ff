"""The one error type that a user can cause, and the hint it carries."""

import sys
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache


class UserError(ValueError):
    """Something the user can mend; the message is one sentence that says what is wrong and what to do.

    Commands print it and exit with code 2. Anything else that escapes a command is a bug.
    """


def warn(message: str) -> None:
    """Print a warning to standard error."""
    print(f"warning: {message}", file=sys.stderr)


@cache
def warn_once(message: str) -> None:
    """Print a warning that a command meets each time it reads the same file."""
    warn(message)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


MAX_LISTED = 12


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the hint that names the known word nearest to `name`, or all of a few when none is near."""
    words = sorted(known)
    near = get_close_matches(name, words, n=1, cutoff=0.5)
    if near:
        return f'did you mean "{near[0]}"?'
    if len(words) <= MAX_LISTED:
        return f"known are: {', '.join(words)}"
    return f'the nearest known is "{get_close_matches(name, words, n=1, cutoff=0)[0]}"'
