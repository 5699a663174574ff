"""Find the files of a collection in the folder that its archives were unpacked into."""

import filecmp
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from isic.headers import IMAGE_SUFFIXES
from isic.importers.collections import COLLECTIONS, Collection, Table
from isic.runtime.errors import UserError

ARCHIVES = (".zip", ".tar", ".gz", ".7z", ".rar")


class SourceFiles:
    """All files below a folder, by name."""

    def __init__(self, root: Path) -> None:
        """List the folder. Raise UserError if it does not exist."""
        if not root.is_dir():
            raise UserError(f"no such folder: {root}; give the one with the collection's files")
        self.root = root
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                self._by_name[path.name].append(path)

    def find_table(self, table: Table) -> Path | None:
        """Return the file of a table, None if there is none. Raise UserError for different ones."""
        for name in table.names:
            if paths := self._by_name.get(name):
                return _one_of(paths)
        return None

    def images(self, folders: Sequence[str], ending: str = "") -> dict[str, list[Path]]:
        """Return the image files by name without the ending.

        Args:
            folders: names of folders to search; if none of them exists, all are searched.
            ending: of the names; by default any of an image.
        """
        paths = [path for found in self._by_name.values() for path in found]
        within = [path for path in paths if set(folders) & set(self._parents(path))]
        found: dict[str, list[Path]] = defaultdict(list)
        for path in within or paths:
            if ending and path.name.endswith(ending):
                found[path.name.removesuffix(ending)].append(path)
            elif not ending and path.suffix.lower() in IMAGE_SUFFIXES:
                found[path.stem].append(path)
        return found

    def has_folder(self, name: str) -> bool:
        return any(
            name in self._parents(path) for paths in self._by_name.values() for path in paths
        )

    def archives(self) -> list[str]:
        """Return the names of archives, which are not unpacked."""
        return sorted(name for name in self._by_name if name.lower().endswith(ARCHIVES))

    def _parents(self, path: Path) -> tuple[str, ...]:
        return path.relative_to(self.root).parts[:-1]


def _one_of(paths: Sequence[Path]) -> Path:
    """Return the first of equal files. Raise UserError if they differ."""
    first, *others = paths
    for path in others:
        if not filecmp.cmp(first, path, shallow=False):
            raise UserError(
                f"{first} and {path} have the same name and differ; move one of them elsewhere"
            )
    return first


def find_tables(files: SourceFiles, collection: Collection) -> dict[Table, Path]:
    """Return the path of each table. Raise UserError if one is missing."""
    found = {}
    for table in collection.tables:
        path = files.find_table(table)
        if path is None:
            raise UserError(_no_table(files, collection, table))
        found[table] = path
    return found


def _no_table(files: SourceFiles, collection: Collection, table: Table) -> str:
    text = f"{files.root} has no {' or '.join(table.names)}"
    for name, other in COLLECTIONS.items():
        if other is not collection and files.find_table(other.tables[0]):
            return f"{text}, but the files of {name}; run `python -m isic import {name}`"
    if archives := files.archives():
        return f"{text}; unpack {', '.join(archives[:3])} there"
    return f"{text}; download it from {collection.url}"


def find_images(files: SourceFiles, collection: Collection, ids: Iterable[str]) -> dict[str, Path]:
    """Return the file of each image. Raise UserError if one has none, or different ones."""
    available = files.images(collection.image_folders)
    wanted = list(ids)
    missing = [name for name in wanted if name not in available]
    if missing:
        text = (
            f"{files.root} lacks the images of {len(missing):,} of {len(wanted):,} rows, the first "
            f"is {missing[0]}"
        )
        archives = files.archives()
        hint = f"unpack {', '.join(archives[:3])}" if archives else "unpack every archive of images"
        raise UserError(f"{text}; {hint} there")
    return {name: _one_of(available[name]) for name in wanted}


def find_masks(
    files: SourceFiles, collection: Collection, ids: Iterable[str]
) -> Mapping[str, Path]:
    """Return the file of each mask, for the images that have one."""
    folder = collection.mask_folder
    if not folder or not files.has_folder(folder):
        return {}
    available = files.images([folder], collection.mask_ending)
    return {name: _one_of(available[name]) for name in ids if name in available}
