"""The features of an ensemble, from the words of `--features`."""

from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl

from infer.ensemble.image_columns import EMBEDDING_MODES
from infer.ensemble.image_features import ImageState
from isic import features, schema

IMAGE_WORDS = ("image", "multimodal")
"""Words that include the image model's score."""


@dataclass(frozen=True)
class FeatureSpec:
    """The features of the boosters."""

    words: tuple[str, ...]
    tabular: tuple[str, ...]
    """Names of the tabular features."""
    uses_score: bool
    """Whether the image model's score is a feature."""
    embedding_modes: tuple[str, ...]
    """The kinds of embedding columns, of EMBEDDING_MODES."""

    @classmethod
    def parse(cls, text: str) -> "FeatureSpec":
        """Parse a comma-separated list of sets, groups and features.

        `image` is the image model's score, `multimodal` is `image` and `engineered`; `aligned` and
        `frozen` are embeddings as columns.

        Raises:
            UserError: an unknown word, or a column that only training tables have.
        """
        words = tuple(word.strip() for word in text.split(","))
        image_words = (*IMAGE_WORDS, *EMBEDDING_MODES)
        tabular_words = [word for word in words if word not in image_words]
        if "multimodal" in words:
            tabular_words.append("engineered")
        return cls(
            words,
            tabular=features.expand(tabular_words, also_known=image_words),
            uses_score=any(word in IMAGE_WORDS for word in words),
            embedding_modes=tuple(mode for mode in EMBEDDING_MODES if mode in words),
        )

    @property
    def images(self) -> bool:
        """Whether any feature comes from images."""
        return self.uses_score or bool(self.embedding_modes)

    def names(self, image: ImageState) -> tuple[str, ...]:
        """Return the columns of the boosters' matrix.

        There are none, and no boosters, if the image model's score is the only feature.
        """
        if not (self.tabular or self.embedding_modes):
            return ()
        return (*self.tabular, *image.names)

    def frame(self, metadata: pl.DataFrame, image: Iterable[pl.DataFrame]) -> pl.DataFrame:
        """Return the feature table: `isic_id`, tabular and image columns.

        Args:
            metadata: the rows, whose order is kept.
            image: tables of `isic_id` and columns in the same order.
        """
        tabular = features.compute(metadata, self.tabular)
        return pl.concat([tabular, *(table.drop(schema.ID) for table in image)], how="horizontal")
