"""Columns of networks as words of `--features` that leave them out.

`-image_score.vit_tiny` is one column, `-image_score` the same column of every network.
"""

import re
from collections.abc import Collection, Sequence

from infer.ensemble.images.columns import ALIGNED
from infer.ensemble.images.distances import DISTANCES, distance_columns
from infer.ensemble.images.features import (
    EMBEDDED_FORMS,
    FROZEN_FORMS,
    FROZEN_SCORE,
    SCORE,
    SCORE_FORMS,
    ImageState,
)
from infer.ensemble.images.frozen import FROZEN, PCA
from infer.ensemble.images.relative_scores import score_column
from isic.runtime.errors import UserError, did_you_mean

NUMBERED = re.compile(rf"({ALIGNED}|{FROZEN}|{PCA})_\d+")
"""First parts of the columns of embeddings."""


def first_part(column: str) -> str:
    """Return the name of a column without its network's: `image_score`."""
    return column.partition(".")[0]


FORM_OF_PART = {
    **{
        first_part(score_column(SCORE, "", relative)): form
        for form, relatives in SCORE_FORMS.items()
        for relative in relatives
    },
    **{
        first_part(score_column(FROZEN_SCORE, "", relative)): FROZEN_SCORE
        for relative in SCORE_FORMS["image"]
    },
    **{first_part(column): DISTANCES for column in distance_columns("")},
}
"""The form, of FORMS, of each first part but those of embeddings."""
RELATIVE_PARTS = FORM_OF_PART.keys() - {SCORE, FROZEN_SCORE}
"""First parts of the columns that depend on the patient's other lesions."""


def form_of(word: str) -> str | None:
    """Return the form, of FORMS, of a column or of a first part; None if it is neither."""
    part = first_part(word)
    numbered = NUMBERED.fullmatch(part)
    return numbered[1] if numbered else FORM_OF_PART.get(part)


def compares_lesions(column: str) -> bool:
    """Return whether a column depends on the patient's other lesions."""
    return first_part(column) in RELATIVE_PARTS


def without(columns: Sequence[str], words: Collection[str]) -> tuple[str, ...]:
    """Return the columns that no word names, neither in full nor by the first part."""
    return tuple(name for name in columns if not {name, first_part(name)} & {*words})


def refuse_idle_words(features: str, words: Collection[str], image: ImageState) -> None:
    """Raise a UserError for a word without a column, or a form or network with no column left.

    Args:
        features: the value of `--features`, for messages.
        words: those that leave columns out.
    """
    for word in words:
        if without(image.names, [word]) == image.names:
            raise UserError(f'unknown features "{word}", {did_you_mean(word, image.names)}')
    left = without(image.names, words)
    forms = {form_of(name) for name in left}
    for form in image.forms:
        if form not in forms:
            raise UserError(
                f"--features {features} leaves out every column of {form}; write -{form} instead"
            )
    for flag, forms_of_flag, networks in (
        ("embeddings", EMBEDDED_FORMS, image.networks),
        ("frozen", FROZEN_FORMS, image.frozen),
    ):
        used = {name.partition(".")[2] for name in left if form_of(name) in forms_of_flag}
        for network in networks:
            if network not in used:
                raise UserError(
                    f"--features {features} leaves out every column of {network}, which would be "
                    f"read for nothing; remove {network} from --{flag}, and its columns from "
                    "--features"
                )
