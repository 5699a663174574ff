"""A lock on an output, so that two commands at once do not mix their files."""

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from isic.runtime.errors import UserError
from isic.runtime.files import digest, read_text

_held: set[Path] = set()
"""The locks of this process."""


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold a file or a folder, which need not exist, against this user's other processes.

    Processes on other machines are not noticed. The lock ends with the process, even if it is
    killed, and must not be taken twice: POSIX would release it with the inner block.

    Raises:
        UserError: another process holds it, or a symbolic link is in the place of the lock.
    """
    # Not beside the output: a command that fails writes nothing there.
    folder = Path(tempfile.gettempdir())
    lock = folder / f"isic-toolkit-{os.getuid()}-{digest(path.resolve())}.lock"
    assert lock not in _held, f"this process holds {path} already"
    held = None
    try:
        held = _lock(lock)
        _held.add(lock)
    except BlockingIOError:
        raise UserError(
            f"process {_holder(lock)} is writing {path}; wait for its end, or choose another output"
        ) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(
                f"{lock} is a symbolic link, which is not followed; remove it, or give a TMPDIR of "
                "your own"
            ) from None
        # Without a lock, as on a full disk, a command is only less safe.
    try:
        yield
    finally:
        if held is not None:
            lock.unlink(missing_ok=True)
            os.close(held)
            _held.remove(lock)


def _lock(lock: Path) -> int:
    """Return the descriptor of a locked file. Raise BlockingIOError if another process has it."""
    while True:
        # Not through a link: anybody may have put one there, to have its target overwritten.
        held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            # Not flock, which children that outlive this process would keep.
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(lock, held):
                os.truncate(held, 0)
                os.write(held, str(os.getpid()).encode())
                return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)  # its holder has just removed it


def _is_at(path: Path, opened: int) -> bool:
    """Return whether a path is still that of an opened file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(opened))
    except FileNotFoundError:
        return False


def _holder(lock: Path) -> str:
    with contextlib.suppress(UserError):
        return read_text(lock)
    return "of another command"
