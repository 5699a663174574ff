"""The features of an ensemble, from the words of `--features`."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import polars as pl

from infer.ensemble.feature_words import FeatureWords, Lists, parse_words
from infer.ensemble.image_columns import EMBEDDING_MODES
from infer.ensemble.image_features import ImageState
from infer.ensemble.own_columns import OwnColumns
from isic import features, schema
from isic.features.definitions import (
    columns_of_definitions,
    compute_definitions,
    needed_definitions,
    relative_to_others,
)
from isic.runtime.errors import UserError

IMAGE_WORDS = ("image", "multimodal")
"""Words that include the image model's score."""
SCORE = "image"
"""The word for that score alone."""


@dataclass(frozen=True)
class FeatureSpec:
    """The features of the boosters."""

    words: FeatureWords
    tabular: tuple[str, ...]
    """Names of the tabular features."""
    uses_score: bool
    """Whether the image model's score is a feature."""
    embedding_modes: tuple[str, ...]
    """The kinds of embedding columns, of EMBEDDING_MODES."""
    own: OwnColumns = field(default_factory=OwnColumns)
    own_names: tuple[str, ...] = ()
    """Names of the own columns that are features."""

    @classmethod
    def parse(
        cls, text: str, own: OwnColumns | None = None, lists: Lists | None = None
    ) -> "FeatureSpec":
        """Parse a comma-separated list of sets, groups and features.

        `image` is the image model's score, `multimodal` is `image` and `engineered`; `aligned` and
        `frozen` are embeddings as columns. `-word` leaves features out; `@file` names a list.

        Args:
            own: the user's own columns, whose sets and names are words too.
            lists: the words of lists, for those that are not read from their files.

        Raises:
            UserError: an unknown word, a column that only training tables have, a word that leaves
                nothing out, own columns that are not requested, or no features.
        """
        own = own or OwnColumns()
        words = parse_words(text, lists)
        wanted = _expand(words.wanted, own)
        unwanted = _expand(words.unwanted, own)
        _refuse_vain(words, wanted, own)
        image = wanted.image - unwanted.image
        spec = cls(
            words,
            tabular=tuple(name for name in wanted.tabular if name not in unwanted.tabular),
            uses_score=SCORE in image,
            embedding_modes=tuple(mode for mode in EMBEDDING_MODES if mode in image),
            own=own,
            own_names=tuple(name for name in wanted.own if name not in unwanted.own),
        )
        if not (spec.tabular or spec.own_names or image):
            raise UserError(f'no features are left of "{text}"; leave out less')
        return spec

    @property
    def images(self) -> bool:
        """Whether any feature comes from images."""
        return self.uses_score or bool(self.embedding_modes)

    @property
    def image_words(self) -> tuple[str, ...]:
        """Words that request the same image features."""
        return (*([SCORE] if self.uses_score else []), *self.embedding_modes)

    @property
    def table_names(self) -> tuple[str, ...]:
        """The features that do not come from images."""
        return (*self.tabular, *self.own_names)

    @property
    def is_relative(self) -> bool:
        """Whether a tabular feature depends on the patient's other lesions."""
        own = relative_to_others(self.own.all_definitions, self.own_names)
        return features.relative_to_patient(self.tabular) or own

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The metadata columns that the features read."""
        own = columns_of_definitions(self.own.all_definitions, self.own_names)
        return tuple(dict.fromkeys((*features.needed_columns(self.tabular), *own)))

    def names(self, image: ImageState) -> tuple[str, ...]:
        """Return the columns of the boosters' matrix.

        There are none, and no boosters, if the image model's score is the only feature.
        """
        if not (self.table_names or self.embedding_modes):
            return ()
        return (*self.table_names, *image.names)

    def frame(self, metadata: pl.DataFrame, more: Iterable[pl.DataFrame]) -> pl.DataFrame:
        """Return the feature table: `isic_id`, tabular, own and image columns.

        Args:
            metadata: the rows, whose order is kept.
            more: tables of `isic_id` and columns in the same order, from own tables and images.
        """
        tabular = features.compute(metadata, self.tabular)
        definitions = self.own.all_definitions
        defined = {name for definition in definitions for name in definition.names}
        names = [name for name in self.own_names if name in defined]
        parts = [tabular]
        if names:
            parts.append(compute_definitions(definitions, metadata, names))
        return pl.concat([*parts, *(table.drop(schema.ID) for table in more)], how="horizontal")


@dataclass(frozen=True)
class _Names:
    """The features behind some words."""

    tabular: tuple[str, ...]
    own: tuple[str, ...]
    image: frozenset[str]
    """SCORE and the kinds of embedding columns."""

    def meets(self, other: "_Names") -> bool:
        """Return whether both have a feature."""
        return bool(
            {*self.tabular, *self.own} & {*other.tabular, *other.own} or self.image & other.image
        )


def _expand(words: Iterable[str], own: OwnColumns) -> _Names:
    image_words = (*IMAGE_WORDS, *EMBEDDING_MODES)
    sets = own.sets
    tabular: list[str] = []
    owned: set[str] = set()
    image: set[str] = set()
    for word in words:
        if word in image_words:
            image.add(SCORE if word in IMAGE_WORDS else word)
            tabular += ["engineered"] if word == "multimodal" else []
        elif word in sets or word in own.names:
            owned.update(sets.get(word, (word,)))
        else:
            tabular.append(word)
    known = (*image_words, *sets, *own.names)
    return _Names(
        features.expand(tabular, also_known=known),
        tuple(name for name in own.names if name in owned),
        frozenset(image),
    )


def _refuse_vain(words: FeatureWords, wanted: _Names, own: OwnColumns) -> None:
    """Raise a UserError for a word that leaves nothing out, or own columns that are not used."""
    for word in words.unwanted:
        if not _expand([word], own).meets(wanted):
            raise UserError(f'"-{word}" leaves nothing out of {words.text}; remove it')
    unused = [word for word, names in own.sets.items() if not set(names) & _read(wanted, own)]
    if unused:
        raise UserError(
            f"--features {words.text} requests nothing of {unused[0]}; add it: "
            f"--features {words.text},{unused[0]}"
        )


def _read(wanted: _Names, own: OwnColumns) -> set[str]:
    """Return the own features that are wanted, or that wanted definitions read."""
    definitions = own.all_definitions
    used = needed_definitions(definitions, wanted.own)
    return {*wanted.own, *(name for definition in used for name in definition.names)}
