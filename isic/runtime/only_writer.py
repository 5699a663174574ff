"""A lock on an output, so that two commands at once do not mix their files."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from isic.runtime.errors import UserError
from isic.runtime.files import digest, read_text


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold a file or a folder, which need not exist, against this user's other processes.

    Processes on other machines are not noticed. The lock ends with the process, even if it is
    killed.

    Raises:
        UserError: another process holds it.
    """
    # Not beside the output: a command that fails writes nothing there.
    folder = Path(tempfile.gettempdir())
    lock = folder / f"isic-toolkit-{os.getuid()}-{digest(path.resolve())}.lock"
    held = None
    try:
        held = _lock(lock)
    except BlockingIOError:
        raise UserError(
            f"process {_holder(lock)} is writing {path}; wait for its end, or choose another output"
        ) from None
    except OSError:
        pass  # without a lock, as on a full disk, a command is only less safe
    try:
        yield
    finally:
        if held is not None:
            lock.unlink(missing_ok=True)
            os.close(held)


def _lock(lock: Path) -> int:
    """Return the descriptor of a locked file. Raise BlockingIOError if another process has it."""
    while True:
        held = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # Not flock, which children that outlive this process would keep.
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and lock.stat().st_ino == os.fstat(held).st_ino:
                os.truncate(held, 0)
                os.write(held, str(os.getpid()).encode())
                return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)  # its holder has just removed it


def _holder(lock: Path) -> str:
    with contextlib.suppress(UserError):
        return read_text(lock)
    return "of another command"
