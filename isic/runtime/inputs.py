"""The tables that a command has read: if one changes, its digest is no longer that of the rows."""

import contextlib
import hashlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from isic.runtime.errors import UserError

State = tuple[int, int, int]
"""Inode, size, and time of the last change in ns."""

_read: ContextVar[dict[Path, tuple[State, str]] | None] = ContextVar("read", default=None)
"""State and SHA-256 of each table of the command."""


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
    if read is not None and path.resolve() not in read:
        with contextlib.suppress(OSError):  # the reader reports it
            if path.is_file():  # a pipe can be read only once
                read[path.resolve()] = _state(path), file_sha256(path)
    yield
    sha256_as_read(path)


def sha256_as_read(path: Path) -> str | None:
    """Return the digest of a table that this command has read, None for another file.

    Raises:
        UserError: the table has changed since.
    """
    read = _read.get()
    if not read or path.resolve() not in read:
        return None
    before, digest = read[path.resolve()]
    with contextlib.suppress(OSError):
        now = _state(path)
        # A backup or a synchronisation may renew a file without changing it.
        if now == before or (now[1] == before[1] and file_sha256(path) == digest):
            read[path.resolve()] = now, digest
            return digest
    raise UserError(f"{path} was changed while it was read; run the same command again")


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes. Raise OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> State:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
