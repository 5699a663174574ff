"""The file operations of a process, noted while it runs, and a signal before one of them.

Python reports them by its audit events: files that are opened to be created, renamed and removed,
and folders. `os.fsync` has no event and is replaced by one that only notes; the kernel keeps what
processes write until the machine itself fails.
"""

import contextlib
import json
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEPT = "kept"
"""Folder of links to files that the process replaces or removes, beside the log."""
LOG = "operations.jsonl"


@dataclass(frozen=True)
class Strike:
    """A signal that a process sends to itself before one of its file operations."""

    operation: int
    """From 1."""
    number: int


def note_operations(root: Path, place: Path, strike: Strike | None = None) -> None:
    """Note the operations of this process below `root` in a log in the folder `place`."""
    (place / KEPT).mkdir(parents=True, exist_ok=True)
    recorder = _Recorder(root, place, strike)
    sys.addaudithook(recorder.on_event)
    os.fsync = recorder.on_sync  # type: ignore[assignment]


def read_operations(place: Path) -> list[dict[str, Any]]:
    """Return the noted operations; the last one may not have been carried out."""
    path = place / LOG
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


class _Recorder:
    def __init__(self, root: Path, place: Path, strike: Strike | None) -> None:
        self._root = root.resolve()
        self._place = place.resolve()
        self._strike = strike
        self._log = os.open(place / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._number = 0
        self._lock = threading.Lock()
        self._inside = threading.local()
        self._events: dict[str, Callable[..., None]] = {
            "open": self._on_open,
            "os.rename": self._on_rename,
            "os.remove": self._on_remove,
            "os.mkdir": self._on_mkdir,
            "os.rmdir": self._on_rmdir,
        }

    def on_event(self, name: str, arguments: tuple[Any, ...]) -> None:
        handler = self._events.get(name)
        if handler is None or getattr(self._inside, "handler", False):
            return
        with self._within():
            handler(*arguments)

    @contextlib.contextmanager
    def _within(self) -> Iterator[None]:
        """Note no operation of the recorder itself."""
        self._inside.handler = True
        try:
            yield
        finally:
            self._inside.handler = False

    def on_sync(self, descriptor: int) -> None:
        """Note, in place of `os.fsync`, that a file or a folder is synchronised."""
        with self._within():
            found = os.fstat(descriptor)
            path = _path_of(descriptor)
            if stat.S_ISDIR(found.st_mode):
                self._note("sync_folder", path, folder=found.st_ino)
            else:
                self._note("sync", path, inode=found.st_ino, state=state_of(found))

    def _on_open(self, path: Any, mode: str | None, flags: int) -> None:
        if flags & os.O_CREAT:
            name = self._absolute(path, -1)
            if name and not os.path.lexists(name):
                self._note("create", name)

    def _on_rename(self, source: Any, target: Any, source_dir: int, target_dir: int) -> None:
        before, after = self._absolute(source, source_dir), self._absolute(target, target_dir)
        if before and after:
            inode = before.lstat().st_ino
            self._note("replace", after, source=before.name, inode=inode, former=self._keep(after))

    def _on_remove(self, path: Any, folder: int) -> None:
        name = self._absolute(path, folder)
        if name:
            self._note("remove", name, former=self._keep(name))

    def _on_mkdir(self, path: Any, mode: int, folder: int) -> None:
        name = self._absolute(path, folder)
        if name and not os.path.lexists(name):
            self._note("mkdir", name)

    def _on_rmdir(self, path: Any, folder: int) -> None:
        name = self._absolute(path, folder)
        if name:
            self._note("rmdir", name)

    def _absolute(self, path: Any, folder: int) -> Path | None:
        """Return an absolute path below the root, None for any other."""
        if isinstance(path, int) or path is None:
            return None
        name = Path(os.fsdecode(path))
        if folder >= 0:
            name = _path_of(folder) / name
        # The last part may be a link, which is then meant itself.
        name = name.parent.resolve() / name.name
        return name if self._root in name.parents else None

    def _keep(self, path: Path) -> str | None:
        """Keep a file that is about to be lost. Return the name that it is kept under."""
        name = str(self._number)
        try:
            os.link(path, self._place / KEPT / name, follow_symlinks=False)
        except OSError:  # missing, or a folder
            return None
        return name

    def _note(self, kind: str, path: Path, **facts: Any) -> None:
        if self._root not in (path, *path.parents):
            return
        facts.setdefault("folder", _inode(path.parent))
        line = json.dumps({"kind": kind, "name": path.name, **facts}) + "\n"
        with self._lock:
            self._number += 1
            strike = self._strike
            if strike is None or strike.operation != self._number:
                os.write(self._log, line.encode())
                return
            if strike.number != signal.SIGKILL:
                os.write(self._log, line.encode())
        os.kill(os.getpid(), strike.number)


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def state_of(found: os.stat_result) -> list[int]:
    """Return size and time of the last change, which differ after a write."""
    return [found.st_size, found.st_mtime_ns]
