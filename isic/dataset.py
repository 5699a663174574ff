"""A dataset folder in the layout of the challenge."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from isic import folds, schema
from isic.errors import UserError
from isic.images import ImageStore, open_images
from isic.metadata import read_metadata

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Dataset:
    """A folder with `<split>-metadata.csv` (or .parquet) and images as `<split>-image.hdf5` or `<split>-image/`."""

    root: Path

    def metadata_path(self, split: Split) -> Path:
        if not self.root.is_dir():
            raise UserError(
                f"no such folder: {self.root}; point --data at a dataset in the layout of the challenge"
            )
        parquet = self.root / f"{split}-metadata.parquet"
        return parquet if parquet.is_file() else self.root / f"{split}-metadata.csv"

    def metadata(self, split: Split, need: Iterable[str] = ()) -> pl.DataFrame:
        """Reads the table of a split. A training table always needs a target. Raises UserError."""
        needed = (schema.TARGET, *need) if split == "train" else tuple(need)
        return read_metadata(self.metadata_path(split), needed)

    def images(self, split: Split) -> ImageStore:
        """Opens the images of a split. Raises UserError where there are none."""
        images = self.find_images(split)
        if images is None:
            raise UserError(
                f"{self.root} has neither {split}-image.hdf5 nor {split}-image/; add the images"
            )
        return images

    def find_images(self, split: Split) -> ImageStore | None:
        return open_images(self.root, split)

    @property
    def masks_path(self) -> Path:
        return self.root / "masks.hdf5"

    @property
    def folds_path(self) -> Path:
        """A fold plan that lies with the data, where somebody put one there."""
        return self.root / folds.FILE

    @property
    def sample_submission_path(self) -> Path:
        return self.root / "sample_submission.csv"
