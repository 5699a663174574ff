"""The features of an ensemble, from the words of `--features`."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import polars as pl

from infer.ensemble.features.own_columns import OwnColumns
from infer.ensemble.features.own_tables import OOF
from infer.ensemble.features.words import MINUS, FeatureWords, Lists, parse_words
from infer.ensemble.images.column_words import FORM_OF_PART, compares_lesions, form_of, without
from infer.ensemble.images.features import FORMS, ImageState
from isic import features, schema
from isic.features.definitions import (
    columns_of_definitions,
    compute_definitions,
    needed_definitions,
    relative_to_others,
)
from isic.runtime.errors import UserError, did_you_mean

MULTIMODAL = ("engineered", "image")
"""The words that `multimodal` stands for."""
IMAGE_WORDS = ("multimodal", *FORMS)
"""Words that request image features."""


@dataclass(frozen=True)
class FeatureSpec:
    """The features of the boosters."""

    words: FeatureWords
    tabular: tuple[str, ...]
    """Names of the tabular features."""
    forms: tuple[str, ...]
    """The kinds of image features, of FORMS."""
    without_columns: tuple[str, ...] = ()
    """Words for columns of networks that are left out, see `images.column_words`."""
    own: OwnColumns = field(default_factory=OwnColumns)
    own_names: tuple[str, ...] = ()
    """Names of the own columns that are features."""

    @classmethod
    def parse(
        cls, text: str, own: OwnColumns | None = None, lists: Lists | None = None
    ) -> "FeatureSpec":
        """Parse a comma-separated list of sets, groups and features.

        `multimodal` is `engineered` and `image`; the image features are those of FORMS. `-word`
        leaves features out, columns of networks too; `@file` names a list.

        Args:
            own: the user's own columns, whose sets and names are words too.
            lists: the words of lists, for those that are not read from their files.

        Raises:
            UserError: an unknown word, a column that only training tables have, a word that leaves
                nothing out, own columns that are not requested, no features, or a column of a
                network that is requested, or left out without boosters.
        """
        own = own or OwnColumns()
        words = parse_words(text, lists)
        _refuse_unknown_in_lists(words.lists, own)
        wanted = _expand(words.wanted, own)
        unwanted = _expand(words.unwanted, own)
        _refuse_vain(words, wanted, own)
        _refuse_single_columns(wanted.columns)
        forms = wanted.forms - unwanted.forms
        spec = cls(
            words,
            tabular=tuple(name for name in wanted.tabular if name not in unwanted.tabular),
            forms=tuple(form for form in FORMS if form in forms),
            without_columns=tuple(word for word in unwanted.columns if form_of(word) in forms),
            own=own,
            own_names=tuple(name for name in wanted.own if name not in unwanted.own),
        )
        if not (spec.tabular or spec.own_names or forms):
            raise UserError(f'no features are left of "{text}"; leave out less')
        if spec.without_columns and not spec.fits_boosters:
            raise UserError(
                f'"-{spec.without_columns[0]}" leaves nothing out of {text}, as the score is the '
                "mean of the networks' scores; remove it, or a network from --embeddings"
            )
        return spec

    @property
    def images(self) -> bool:
        """Whether any feature comes from images."""
        return bool(self.forms)

    @property
    def table_names(self) -> tuple[str, ...]:
        """The features that do not come from images."""
        return (*self.tabular, *self.own_names)

    @property
    def fits_boosters(self) -> bool:
        """Whether there are boosters; without them the score is the mean of the networks'."""
        return bool(self.table_names) or self.forms != ("image",)

    @property
    def is_relative(self) -> bool:
        """Whether a tabular feature depends on the patient's other lesions."""
        own = relative_to_others(self.own.all_definitions, self.own_names)
        return features.relative_to_patient(self.tabular) or own

    def compares_lesions(self, image: ImageState) -> bool:
        """Return whether the score of a lesion depends on the patient's others."""
        # Without boosters, the score is the mean over the networks' scores.
        if not self.fits_boosters:
            return False
        return self.is_relative or any(map(compares_lesions, self.image_names(image)))

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The metadata columns that the features read."""
        own = columns_of_definitions(self.own.all_definitions, self.own_names)
        return tuple(dict.fromkeys((*features.needed_columns(self.tabular), *own)))

    def names(self, image: ImageState) -> tuple[str, ...]:
        """Return the columns of the boosters' matrix.

        There are none, and no boosters, if the networks' scores are the only features.
        """
        if not self.fits_boosters:
            return ()
        return (*self.table_names, *self.image_names(image))

    def image_names(self, image: ImageState) -> tuple[str, ...]:
        """Return the columns of networks that are not left out."""
        return without(image.names, self.without_columns)

    @property
    def averaged(self) -> set[str]:
        """The columns of `own_by_set` of which a row to score has the mean over folds."""
        return {
            f"{word}.{name}"
            for word, table in self.own.tables.items()
            if table.kind == OOF
            for name in table.columns
        }

    def own_by_set(self, table: pl.DataFrame) -> pl.DataFrame:
        """Return the own columns of a feature table as `set.column`, without relative forms."""
        sets = {
            **{word: [each.name for each in part] for word, part in self.own.definitions.items()},
            **{word: list(part.columns) for word, part in self.own.tables.items()},
        }
        return table.select(
            pl.col(name).alias(f"{word}.{name}")
            for word, names in sets.items()
            for name in names
            if name in self.own_names
        )

    def frame(
        self,
        metadata: pl.DataFrame,
        more: Iterable[pl.DataFrame],
        text: Collection[str] | None = None,
    ) -> pl.DataFrame:
        """Return the feature table: `isic_id`, tabular, own and image columns.

        Args:
            metadata: the rows, whose order is kept.
            more: tables of columns in the same order, from own tables and images.
            text: the columns that were text at the fit, for new rows.
        """
        tabular = features.compute(metadata, self.tabular)
        definitions = self.own.all_definitions
        defined = {name for definition in definitions for name in definition.names}
        names = [name for name in self.own_names if name in defined]
        parts = [tabular]
        if names:
            parts.append(compute_definitions(definitions, metadata, names, text))
        others = (table.drop(schema.ID, strict=False) for table in more)
        return pl.concat([*parts, *others], how="horizontal")


@dataclass(frozen=True)
class _Names:
    """The features behind some words."""

    tabular: tuple[str, ...]
    own: tuple[str, ...]
    forms: frozenset[str]
    """Of FORMS."""
    columns: tuple[str, ...]
    """Words for columns of networks, which are known only when embeddings are read."""

    def meets(self, wanted: "_Names") -> bool:
        """Return whether any of these features may be wanted."""
        forms = {*self.forms, *map(form_of, self.columns)}
        names = {*self.tabular, *self.own} & {*wanted.tabular, *wanted.own}
        return bool(names or forms & wanted.forms)


def _expand(words: Iterable[str], own: OwnColumns) -> _Names:
    sets = own.sets
    tabular: list[str] = []
    owned: set[str] = set()
    forms: set[str] = set()
    columns: list[str] = []
    for given in words:
        for word in MULTIMODAL if given == "multimodal" else (given,):
            if word in FORMS:
                forms.add(word)
            elif word in sets or word in own.names:
                owned.update(sets.get(word, (word,)))
            elif form_of(word):
                columns.append(word)
            else:
                tabular.append(word)
    known = (*IMAGE_WORDS, *FORM_OF_PART, *sets, *own.names)
    return _Names(
        features.expand(tabular, also_known=known),
        tuple(name for name in own.names if name in owned),
        frozenset(forms),
        tuple(columns),
    )


def _refuse_unknown_in_lists(lists: Lists, own: OwnColumns) -> None:
    """Raise a UserError for an unknown word of a list, which may be of a file that is not given."""
    image_words = {*IMAGE_WORDS, *FORM_OF_PART}
    known = {*features.SETS, *features.FEATURES, *image_words, *own.sets, *own.names}
    for name, entries in lists.items():
        for word in (entry.removeprefix(MINUS) for entry in entries):
            if word not in known and not (schema.is_train_only(word) or form_of(word)):
                raise UserError(
                    f'unknown features "{word}" in {name}; if it is an own column, give its file '
                    f"too (--define or --tables); {did_you_mean(word, known)}"
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
            f"--features {words.text},{unused[0]}, or leave out the file of that name"
        )


def _refuse_single_columns(wanted: Sequence[str]) -> None:
    """Raise a UserError if columns of networks are requested by themselves."""
    if wanted:
        form = form_of(wanted[0])
        raise UserError(
            f"{wanted[0]} is not requested by itself; request {form}, and leave other columns out "
            "of it by -column"
        )


def _read(wanted: _Names, own: OwnColumns) -> set[str]:
    """Return the own features that are wanted, or that wanted definitions read."""
    definitions = own.all_definitions
    used = needed_definitions(definitions, wanted.own)
    return {*wanted.own, *(name for definition in used for name in definition.names)}
