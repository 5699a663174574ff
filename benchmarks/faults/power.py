"""A loss of power after a kill: files that the process had not synchronised may be lost.

- A file that was not synchronised, or was written to afterwards, keeps all of its bytes, some of the
  first, or none.
- A folder returns to a random moment since it was last synchronised: files that were created,
  renamed or removed in it since then are as before. Each folder has a moment of its own.

Limits: files that native code creates under a new name keep the name; a change within the clock's
tick (4 ms) after a synchronisation that keeps the size counts as synchronised; file systems may
also reorder changes within a folder. No change outside the folder is undone.
"""

import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.faults.operations import KEPT, read_operations, state_of

States = Mapping[int, list[int]]
"""Size and time of files by inode."""


def file_states(root: Path) -> dict[int, list[int]]:
    """Return the state of each file, all of which are taken for synchronised."""
    found = (path.stat() for path in _files(root))
    return {each.st_ino: state_of(each) for each in found}


def _files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]


def lose_power(root: Path, place: Path, before: States, random: Random) -> None:
    """Bring a folder into a state that it may have after a loss of power.

    Args:
        place: of the log of the killed process.
        before: the files as they were when it was started.
    """
    operations = read_operations(place)
    for number in sorted(_lost(operations, random), reverse=True):
        _undo(operations[number], root, place / KEPT)
    synced = {**before, **{each["inode"]: each["state"] for each in _of(operations, "sync")}}
    for path in sorted(_files(root)):
        found = path.stat()
        if synced.get(found.st_ino) != state_of(found):
            _damage(path, random)


def _of(operations: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in operations if each["kind"] == kind]


def _lost(operations: list[dict[str, Any]], random: Random) -> set[int]:
    """Return the numbers of the operations that are undone, the last ones of each folder."""
    pending: dict[int, list[int]] = defaultdict(list)
    for number, each in enumerate(operations):
        if each["kind"] == "sync_folder":
            pending.pop(each["folder"], None)
        elif each["kind"] != "sync":
            pending[each["folder"]].append(number)
    return {
        number
        for numbers in pending.values()
        for number in numbers[random.randint(0, len(numbers)) :]
    }


def _undo(operation: Mapping[str, Any], root: Path, kept: Path) -> None:
    folders = (path for path in (root, *root.rglob("*")) if path.is_dir())
    folder = next((each for each in folders if each.stat().st_ino == operation["folder"]), None)
    if folder is None:  # it was removed
        return
    path = folder / operation["name"]
    former = operation.get("former")
    match operation["kind"]:
        case "replace" if os.path.lexists(path) and path.lstat().st_ino == operation["inode"]:
            path.rename(folder / operation["source"])
            if former:
                os.link(kept / former, path)
        case "remove" if former and not os.path.lexists(path):
            os.link(kept / former, path)
        case "create":
            path.unlink(missing_ok=True)
        case "mkdir":
            shutil.rmtree(path, ignore_errors=True)
        case "rmdir":
            path.mkdir(exist_ok=True)


def _damage(path: Path, random: Random) -> None:
    size = path.stat().st_size
    kept = random.choice((0, random.randint(0, size), size))
    # A link may have the same content under a name that survives.
    content = path.read_bytes()[:kept]
    path.unlink()
    path.write_bytes(content)
