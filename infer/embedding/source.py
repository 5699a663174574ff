"""The images of an embedding run: a split of a dataset, or any images."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from infer.embedding.store import IMAGES, EmbeddedSplit
from isic.any_images import open_any_images
from isic.dataset import Dataset
from isic.images import ImageStore
from isic.metadata import read_ids
from isic.runtime.files import sha256


@dataclass(frozen=True)
class Source:
    """Images to embed: a folder or a list, and the split of a dataset."""

    data: Path
    """The folder of a dataset; of IMAGES the folder or the list of the images."""
    split: EmbeddedSplit

    def open(self) -> ImageStore:
        """Open the images. Raise UserError if there are none."""
        if self.split == IMAGES:
            return open_any_images(self.data)
        return Dataset(self.data).images(self.split)

    def read_ids(self) -> pl.Series:
        """Return [N] the ids to embed, in the order of the table. Raise UserError."""
        if self.split == IMAGES:
            return open_any_images(self.data).wanted
        return read_ids(Dataset(self.data).metadata_path(self.split))

    def table_digest(self) -> str | None:
        """Return the digest of the table that names the images, None for a folder without one."""
        if self.split != IMAGES:
            return sha256(Dataset(self.data).metadata_path(self.split))
        return None if self.data.is_dir() else sha256(self.data)
