"""The index of each HDF5 file of images, in the user's cache folder."""

import contextlib
import os
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np

from isic.hdf5 import Index, build_index
from isic.runtime.errors import UserError
from isic.runtime.files import atomic_path, cache_folder, digest

INDEX_VERSION = 4
# Some file systems count whole seconds, so a change soon after another one may not show.
SETTLED_SECONDS = 2.0
"""Age in seconds from which a later change alters the time stamps."""

DAMAGED = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, NotImplementedError)
"""Raised by numpy for a file that is not an archive, is truncated or holds other arrays."""

State = tuple[int, int, int, int]
"""Inode, size, mtime and ctime in ns; copying another file over this one changes them."""


def index_path(path: Path) -> Path | None:
    """Return the path of an HDF5 file's cached index, None without a cache."""
    folder = cache_folder()
    key = digest(os.fsencode(os.path.realpath(path)))  # a path need not be UTF-8
    return folder / f"{key}.index.npz" if folder else None


def state(file: int) -> State:
    return _state(os.fstat(file))


def _state(found: os.stat_result) -> State:
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def load_index(path: Path, file: int) -> Index:
    """Return the index of an HDF5 file from the cache, or build and cache it.

    `file` is its descriptor, which is used for reads by offset.

    Raises:
        UserError: as `build_index`, or the file was changed meanwhile.
    """
    before = state(file)
    started = time.time()
    cached = index_path(path)
    key = digest(INDEX_VERSION, os.fsencode(os.path.realpath(path)), *before)
    found = _read(cached, key) if cached else None
    if found:
        return found
    index = build_index(path)
    # The path too: another file may have been moved there meanwhile.
    if not before == state(file) == _state(path.stat()):
        raise UserError(f"{path} was changed while it was read; run the same command again")
    # A file that was written just now may change again without another time stamp.
    if cached and started - max(before[2:]) / 1e9 > SETTLED_SECONDS:
        _write(cached, key, index)
    return index


def _read(cached: Path, key: str) -> Index | None:
    with contextlib.suppress(OSError, *DAMAGED), np.load(cached) as archive:
        if archive["key"] == key:
            return Index(*(archive[name] for name in Index._fields))
    return None


def _write(cached: Path, key: str, index: Index) -> None:
    with (
        contextlib.suppress(OSError, UserError),  # without a cache a command is only slower
        atomic_path(cached) as temporary,
        open(temporary, "wb") as file,
    ):
        np.savez(file, key=np.array(key), **index._asdict())
