"""Judgements on a command's output: whether each file is whole, and equal to that of another run."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import onnx
import polars as pl
import torch

from isic.runtime import yaml12

VARYING = {
    *("seconds", "build_seconds", "images_per_second", "peak_memory_mb"),
    *("waiting_share", "wait_shares", "bound_by", "embedded_now"),
}
"""Keys of measured values, in JSON files, which differ between equal runs."""
COMPILED = ".pt2"
"""Ending of the files that a C++ compiler has made, which differ between equal runs: they are only
read."""
HIDDEN = "."
"""First character of the names of temporary files and locks, which no command reads."""
UNREAD = {"tensorboard", "last.pth"}
"""Names that are not compared: logs have the time in their names, and a fold that is killed when its
results are complete keeps the state of the epoch before, which nothing reads any more."""


def files_of(root: Path) -> dict[str, Path]:
    """Return the files with a final name by their path below a folder."""
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {
        str(path): root / path
        for path in sorted(found)
        if not any(part.startswith(HIDDEN) for part in path.parts)
    }


def broken_files(root: Path) -> list[str]:
    """Return the files with a final name that are not whole, and why."""
    found = []
    for name, path in files_of(root).items():
        reason = _reason_not_whole(path)
        if reason:
            found.append(f"{name} ({reason})")
    return found


def _reason_not_whole(path: Path) -> str | None:
    if not path.stat().st_size and path.suffix in READERS:
        return "empty"
    try:
        READERS.get(path.suffix, Path.read_bytes)(path)
    except Exception as error:  # readers raise exceptions of any type
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def differences(found: Path, expected: Path) -> list[str]:
    """Return the files that only one run has, or that differ in more than measured values."""
    ours, theirs = _compared(found), _compared(expected)
    lacking = [f"{name} is missing" for name in theirs.keys() - ours.keys()]
    more = [f"{name} is not expected" for name in ours.keys() - theirs.keys()]
    differing = [
        f"{name} differs"
        for name in ours.keys() & theirs.keys()
        if not same_content(ours[name], theirs[name])
    ]
    return sorted([*lacking, *more, *differing])


def _compared(root: Path) -> dict[str, Path]:
    return {name: path for name, path in files_of(root).items() if not UNREAD & {*Path(name).parts}}


def same_content(ours: Path, theirs: Path) -> bool:
    """Return whether two files are equal, apart from measured values."""
    if ours.suffix == COMPILED or ours.read_bytes() == theirs.read_bytes():
        return True
    if ours.name.endswith(f"{COMPILED}.json"):
        return _equal(_without_digest(ours), _without_digest(theirs))
    reader = COMPARED.get(ours.suffix)
    return reader is not None and _equal(reader(ours), reader(theirs))


def _without_digest(manifest: Path) -> dict[str, Any]:
    return {**json.loads(manifest.read_text(encoding="utf-8")), "sha256": None}


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        keys = ours.keys() - VARYING
        return keys == theirs.keys() - VARYING and all(_equal(ours[k], theirs[k]) for k in keys)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    if isinstance(ours, float) and isinstance(theirs, float) and math.isnan(ours):
        return math.isnan(theirs)
    return bool(ours == theirs)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_lines(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n"), "the last line is cut off"
    return [json.loads(line) for line in text.splitlines()]


def _read_text(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n"), "the last line is cut off"
    return text


def _read_yaml(path: Path) -> Any:
    return yaml12.load(_read_text(path))


def _read_html(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    assert text.rstrip().endswith(("</html>", "</svg>")), "the end is cut off"
    return text


def _read_checkpoint(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_hdf5(path: Path) -> int:
    with h5py.File(path, "r") as file:
        return len(file)


def _read_png(path: Path) -> None:
    assert path.read_bytes().endswith(b"IEND\xaeB\x60\x82"), "the end is cut off"


READERS: Mapping[str, Callable[[Path], Any]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".yaml": _read_yaml,
    ".parquet": pl.read_parquet,
    ".csv": _read_text,
    ".txt": _read_text,
    ".html": _read_html,
    ".svg": _read_html,
    ".pth": _read_checkpoint,
    ".onnx": onnx.load,
    ".hdf5": _read_hdf5,
    ".png": _read_png,
}
"""Readers by suffix, each of which raises if a file of its kind is not whole."""
COMPARED: Mapping[str, Callable[[Path], Any]] = {
    suffix: READERS[suffix] for suffix in (".json", ".jsonl", ".pth")
}
"""Readers of the files that may hold measured values, or tensors in another order of bytes."""
