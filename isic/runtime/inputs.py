"""The tables that a command has read: if one changes, its digest is no longer that of the rows."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from isic.runtime.errors import UserError

State = tuple[int, int, int]
"""Inode, size, and time of the last change in ns."""

_read: ContextVar[dict[Path, State | None] | None] = ContextVar("read", default=None)


@contextlib.contextmanager
def one_command() -> Iterator[None]:
    """Remember the tables that are read in the block; without it, none is remembered."""
    token = _read.set({})
    try:
        yield
    finally:
        _read.reset(token)


@contextlib.contextmanager
def reading_input(path: Path) -> Iterator[None]:
    """Remember a table that the block reads. Raise UserError if it changes meanwhile."""
    read = _read.get()
    if read is not None:
        read.setdefault(path.resolve(), _state(path))
    yield
    refuse_changed(path)


def refuse_changed(path: Path) -> None:
    """Raise a UserError if a table has changed since this command has read it first."""
    read = _read.get()
    now = _state(path) if read else None
    if read and read.get(path.resolve(), now) != now:
        raise UserError(f"{path} was changed while it was read; run the same command again")


def _state(path: Path) -> State | None:
    try:
        found = path.stat()
    except OSError:  # the reader reports it
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
