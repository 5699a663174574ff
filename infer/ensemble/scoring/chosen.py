"""Choices that were made with the labels of the very rows that a score is reported on.

Such a score may be too high. A manifest lists its choices as sentences without their end under
CHOSEN_KEY, and every place that prints the score prints them too.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from infer.embedding.store import ids_digest
from infer.ensemble.features.words import find_list
from isic import schema
from isic.runtime.files import digest, holds, manifest_path, read_json, read_text

Manifest = Mapping[str, Any]

CHOSEN_KEY = "chosen_on_scored_rows"
SEARCHED_WEIGHTS = "the weights were searched on these rows, each fold's on the other folds"
SELECTED = "selected with the targets of rows"
"""In a comment of a list that `infer select` wrote, before the digest of these rows."""


def choices_of_blend(searched: bool, members: Iterable[Manifest]) -> list[str]:
    """Return the choices behind a blend: the search for its weights, and those of its members.

    Args:
        searched: whether a search for its weights was accepted.
        members: their manifests.
    """
    own = [SEARCHED_WEIGHTS] if searched else []
    inherited = [choice for member in members for choice in choices(member)]
    return list(dict.fromkeys([*own, *inherited]))


def selected_on(metadata: pl.DataFrame) -> str:
    """Return the sentence of a list of features that the rows of a training table have chosen.

    It depends on the ids and targets, in any order of the rows.
    """
    rows = metadata.select(schema.ID, schema.TARGET).sort(schema.ID)
    return f"{SELECTED} {digest(ids_digest(rows[schema.ID]), *rows[schema.TARGET])}"


def choices_of_lists(
    lists: Iterable[str], metadata: pl.DataFrame, metadata_sha256: str
) -> list[str]:
    """Return the lists of features that `infer select` chose on the same rows and targets.

    Args:
        lists: their words in `--features`, such as `@chosen`.
        metadata: the training table.
        metadata_sha256: digest of its file.
    """
    sentence = selected_on(metadata)
    found = []
    for name in lists:
        path = find_list(name)
        if sentence in read_text(path) or _of_earlier_version(path, metadata_sha256):
            found.append(f"the features of {name} were selected on these rows")
    return found


def _of_earlier_version(path: Path, metadata_sha256: str) -> bool:
    """Return whether a list has only a manifest that names the file of the training table."""
    manifest = manifest_path(path)
    return holds(manifest, "by") and read_json(manifest).get("metadata_sha256") == metadata_sha256


def choices(manifest: Manifest) -> list[str]:
    return list(manifest.get(CHOSEN_KEY, ()))


def choice_notes(name: str, manifest: Manifest) -> list[str]:
    """Return a line per choice behind the scores of the ensemble of that name."""
    return [f"note: {name}: {choice}, so its score may be too high" for choice in choices(manifest)]
