"""Small and read-only file systems, which only root can mount, in a name space of this process."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

# From <sched.h> and <sys/mount.h>.
NEW_NAMESPACE = 0x20000
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18
DETACH = 2
PAGE = 4096
"""The unit of a file system in memory, in bytes."""


def _call(name: str, *arguments: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


@cache
def can_mount() -> bool:
    """Give this process mounts of its own; return whether it may."""
    try:
        _call("unshare", NEW_NAMESPACE)
        _call("mount", None, b"/", None, RECURSIVE | PRIVATE, None)
    except OSError:
        return False
    return True


def enter_mounts(pid: int) -> None:
    """See the mounts of another process."""
    folder = Path.cwd()  # becomes the root otherwise
    descriptor = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    _call("setns", descriptor, NEW_NAMESPACE)
    os.close(descriptor)
    os.chdir(folder)


@contextmanager
def mounted(folder: Path, num_bytes: int) -> Iterator[None]:
    """Mount a file system of a size on a folder for the block."""
    _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, _size(num_bytes))
    try:
        yield
    finally:
        _call("umount2", os.fsencode(folder), DETACH)


def resize(folder: Path, num_bytes: int) -> None:
    """Change the size of a mounted file system."""
    _call("mount", None, os.fsencode(folder), None, REMOUNT, _size(num_bytes))


def _size(num_bytes: int) -> bytes:
    return f"size={max(PAGE, num_bytes)}".encode()


@contextmanager
def read_only(folder: Path) -> Iterator[Callable[[], None]]:
    """Make a folder read-only for the block. Yield a function that ends this earlier."""
    name = os.fsencode(folder)
    _call("mount", name, name, None, BIND, None)
    try:
        _call("mount", None, name, None, BIND | REMOUNT | READ_ONLY, None)
        yield partial(_call, "mount", None, name, None, BIND | REMOUNT, None)
    finally:
        _call("umount2", name, DETACH)
