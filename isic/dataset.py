"""A dataset folder in the challenge's layout."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from isic import schema
from isic.images import ImageStore, open_images
from isic.layout import FOLDS_FILE
from isic.metadata import read_metadata
from isic.runtime.errors import UserError, warn_once

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True)
class Dataset:
    """A folder with the tables and images of two splits.

    `<split>-metadata.csv` or `.parquet`; `<split>-image.hdf5` or `<split>-image/`.
    """

    root: Path

    def metadata_path(self, split: Split) -> Path:
        """Return the path of a split's table: Parquet if there are both, with a warning.

        Raises:
            UserError: the folder does not exist.
        """
        if not self.root.is_dir():
            raise UserError(
                f"no such folder: {self.root}; "
                "point --data at a dataset in the layout of the challenge"
            )
        parquet, csv = (self.root / f"{split}-metadata.{ending}" for ending in ("parquet", "csv"))
        if not parquet.exists():
            return csv
        # Which one is newer is unknown, so the choice is reported.
        if csv.exists():
            warn_once(f"{self.root} has {parquet.name} and {csv.name}; {parquet.name} is read")
        return parquet

    def metadata(self, split: Split, need: Iterable[str] = ()) -> pl.DataFrame:
        """Read a split's table; the columns `need`, and in training the target, are required."""
        needed = (schema.TARGET, *need) if split == "train" else tuple(need)
        return read_metadata(self.metadata_path(split), needed)

    def images(self, split: Split) -> ImageStore:
        """Open the images of a split. Raise UserError if there are none."""
        images = self.find_images(split)
        if images is None:
            raise UserError(
                f"{self.root} has neither {split}-image.hdf5 nor {split}-image/; add the images"
            )
        return images

    def find_images(self, split: Split) -> ImageStore | None:
        """Open the images of a split; None if there are none."""
        return open_images(self.root, split)

    @property
    def masks_path(self) -> Path:
        return self.root / "masks.hdf5"

    @property
    def folds_path(self) -> Path:
        """The path of a fold plan that comes with the data; it need not exist."""
        return self.root / FOLDS_FILE

    @property
    def sample_submission_path(self) -> Path:
        return self.root / "sample_submission.csv"


def refuse_dataset(folder: Path, flag: str) -> None:
    """Raise a UserError if an output folder holds a dataset."""
    # A fold plan written there would apply to every later run on that dataset.
    for split in SPLITS:
        for ending in ("csv", "parquet"):
            if os.path.lexists(folder / f"{split}-metadata.{ending}"):
                raise UserError(f"{folder} holds a dataset; choose another {flag}")
