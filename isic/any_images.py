"""Images without a dataset's layout: a folder of files, or a list of their paths."""

import os
from pathlib import Path

import polars as pl

from isic import schema
from isic.images import FileImages, FolderImages
from isic.layout import TABLE_SUFFIXES
from isic.runtime.errors import UserError
from isic.tables import read_table

PATH = "path"
"""Column of a list: file paths, relative to the folder that the list is in."""


class TreeImages(FolderImages):
    """A folder of image files. The id of each is its path in the folder, with the ending.

    So it is unique: `a/1.jpg`, `b/1.jpg` and `a/1.png` are three images.
    """

    def _id(self, folder: Path, path: Path) -> bytes:
        return os.fsencode(path.relative_to(folder).as_posix())

    @property
    def wanted(self) -> pl.Series:
        """[N] the ids, sorted; those of files that cannot be used included."""
        return pl.Series(schema.ID, sorted([*self.ids.tolist(), *self.rejected]), pl.String)


class ListedImages(FileImages):
    """The files of a CSV or Parquet table with a column `path` and, if wanted, `isic_id`.

    Without `isic_id` the id of each is its path as the list has it.
    """

    def __init__(self, path: Path) -> None:
        """Read the list. Raise UserError if it has no rows, a blank, or an id more than once."""
        table = _read_list(path)
        self.wanted: pl.Series = table[schema.ID]
        """[N] the ids in the order of the list."""
        files = ((name.encode(), os.fspath(path.parent / file)) for name, file in table.iter_rows())
        super().__init__(path, files, {})


def _read_list(path: Path) -> pl.DataFrame:
    """Return `isic_id` and `path`, both String."""
    table = read_table(path)
    if PATH not in table.columns:
        raise UserError(
            f"{path} lacks the column {PATH}; give the column of file paths this name, "
            f"and the column of ids, if there is one, the name {schema.ID}"
        )
    ids = schema.ID if schema.ID in table.columns else PATH
    table = table.select(
        pl.col(ids).cast(pl.String).str.strip_chars().alias(schema.ID),
        pl.col(PATH).cast(pl.String).str.strip_chars().alias("_path"),
    )
    if table.is_empty():
        raise UserError(f"{path} has no rows; give a list with at least one")
    for name, column in ((ids, schema.ID), (PATH, "_path")):
        blank = table.filter(pl.col(column).is_null() | (pl.col(column) == ""))
        if len(blank):
            raise UserError(f"{path}: {len(blank)} rows have no {name}; give every row one")
    repeated = table.filter(pl.col(schema.ID).is_duplicated())
    if len(repeated):
        raise UserError(
            f"{path}: {repeated[schema.ID].n_unique()} values of {ids} are repeated, the first is "
            f"{repeated[schema.ID][0]}; keep one row per image"
        )
    return table


def open_any_images(path: Path) -> TreeImages | ListedImages:
    """Open a folder or a list of images. Raise UserError if it is absent or has none."""
    if path.is_dir():
        return TreeImages(path)
    if path.suffix.lower() not in TABLE_SUFFIXES:
        kind = "is neither a folder nor" if path.exists() else "does not exist; give a folder or"
        raise UserError(f"{path} {kind} a list of images (.csv or .parquet)")
    return ListedImages(path)
