"""The features of an ensemble, from the words of `--features`."""

from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl

from infer.ensemble.image_features import FORMS, ImageState
from isic import features

MULTIMODAL = ("engineered", "image")
"""The words that `multimodal` stands for."""


@dataclass(frozen=True)
class FeatureSpec:
    """The features of the boosters."""

    words: tuple[str, ...]
    tabular: tuple[str, ...]
    """Names of the tabular features."""
    forms: tuple[str, ...]
    """The kinds of image features, of FORMS."""

    @classmethod
    def parse(cls, text: str) -> "FeatureSpec":
        """Parse a comma-separated list of sets, groups and features.

        `multimodal` is `engineered` and `image`; the image features are those of FORMS.

        Raises:
            UserError: an unknown word, or a column that only training tables have.
        """
        words = tuple(word.strip() for word in text.split(","))
        known = ("multimodal", *FORMS)
        wanted = [*words, *(MULTIMODAL if "multimodal" in words else ())]
        tabular_words = [word for word in wanted if word not in known]
        return cls(
            words,
            tabular=features.expand(tabular_words, also_known=known),
            forms=tuple(form for form in FORMS if form in wanted),
        )

    @property
    def images(self) -> bool:
        """Whether any feature comes from images."""
        return bool(self.forms)

    def names(self, image: ImageState) -> tuple[str, ...]:
        """Return the columns of the boosters' matrix.

        There are none, and no boosters, if the networks' scores are the only features.
        """
        if not self.tabular and self.forms == ("image",):
            return ()
        return (*self.tabular, *image.names)

    def frame(self, metadata: pl.DataFrame, image: Iterable[pl.DataFrame]) -> pl.DataFrame:
        """Return the feature table: `isic_id`, tabular and image columns.

        Args:
            metadata: the rows, whose order is kept.
            image: tables of image columns in the same order.
        """
        tabular = features.compute(metadata, self.tabular)
        return pl.concat([tabular, *image], how="horizontal")
