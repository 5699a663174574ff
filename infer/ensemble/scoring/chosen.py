"""Choices that were made with the labels of the very rows that a score is reported on.

Such a score may be too high. A manifest lists its choices as sentences without their end under
CHOSEN_KEY, and every place that prints the score prints them too.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from infer.ensemble.features.words import find_list
from isic.runtime.files import holds, manifest_path, read_json

Manifest = Mapping[str, Any]

CHOSEN_KEY = "chosen_on_scored_rows"
SEARCHED_WEIGHTS = "the weights were searched on these rows, each fold's on the other folds"


def choices_of_blend(searched: bool, members: Iterable[Manifest]) -> list[str]:
    """Return the choices behind a blend: the search for its weights, and those of its members.

    Args:
        searched: whether a search for its weights was accepted.
        members: their manifests.
    """
    own = [SEARCHED_WEIGHTS] if searched else []
    inherited = [choice for member in members for choice in choices(member)]
    return list(dict.fromkeys([*own, *inherited]))


def choices_of_lists(lists: Iterable[str], metadata_sha256: str) -> list[str]:
    """Return the lists of features that `infer select` chose on the same training table.

    Args:
        lists: their words in `--features`, such as `@chosen`.
        metadata_sha256: digest of the training table.
    """
    found = []
    for name in lists:
        path = manifest_path(find_list(name))
        # A list without a manifest was written by hand.
        if holds(path, "by") and read_json(path).get("metadata_sha256") == metadata_sha256:
            found.append(f"the features of {name} were selected on these rows")
    return found


def choices(manifest: Manifest) -> list[str]:
    return list(manifest.get(CHOSEN_KEY, ()))


def choice_notes(name: str, manifest: Manifest) -> list[str]:
    """Return a line per choice behind the scores of the ensemble of that name."""
    return [f"note: {name}: {choice}, so its score may be too high" for choice in choices(manifest)]
