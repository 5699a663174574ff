"""The part of `python -m isic check` on images and patients that occur more than once."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations_with_replacement
from pathlib import Path

import polars as pl

from isic import schema
from isic.any_images import open_any_images
from isic.dataset import SPLITS, Dataset
from isic.duplicates import KINDS, Prints, find_pairs, fingerprint
from isic.images import ImageStore
from isic.runtime.files import atomic_path
from isic.tables import is_parquet, write_parquet

EXAMPLES = 3
"""Pairs that are shown for two sources."""

Facts = dict[str, str]


def open_others(folders: Iterable[Path]) -> dict[str, ImageStore]:
    """Open the images to compare a dataset with, by name. Raise UserError for a folder without.

    Args:
        folders: datasets, whose splits are opened, and folders or lists of images.
    """
    found: dict[str, ImageStore] = {}
    for folder in folders:
        dataset = Dataset(folder)
        splits = [(split, dataset.find_images(split)) for split in SPLITS if folder.is_dir()]
        opened = {f"{folder}/{split}": images for split, images in splits if images is not None}
        found |= opened or {str(folder): open_any_images(folder)}
    return found


def duplicate_facts(
    own: Sequence[Prints],
    others: Mapping[str, ImageStore],
    patients: Mapping[str, str],
    num_threads: int,
    output: Path | None,
) -> Facts:
    """Return the pairs of images that are alike, counted by sources, with examples.

    Args:
        own: the fingerprints of the dataset's splits.
        others: images to compare them with.
        patients: by id of the dataset's rows.
        output: the file to write all pairs to, if any.
    """
    found, facts = list(own), {}
    for source, images in others.items():
        prints, failed = fingerprint(source, images, images.ids.tolist(), num_threads)
        found.append(prints)
        if failed:
            facts[f"undecodable in {source}"] = f"{len(failed):,}"
    own_sources = {prints.source for prints in own}
    # Other folders are not compared with each other; the dataset's images come first in each pair.
    pairs = find_pairs(found, num_threads).filter(pl.col("source").is_in(own_sources))
    if output:
        _write(output, pairs)
    facts = {
        "compared": ", ".join(f"{len(prints):,} of {prints.source}" for prints in found)
    } | facts
    num_flat = sum(int(prints.is_flat.sum()) for prints in found)
    if num_flat:
        facts["without structure"] = f"{num_flat:,}, compared by their bytes only"
    for one, two in combinations_with_replacement([prints.source for prints in found], 2):
        if one in own_sources:
            between = pairs.filter(source=one, other_source=two)
            facts[f"within {one}" if one == two else f"{one} and {two}"] = _counts(
                between, patients if {one, two} <= own_sources else {}
            )
    return facts


def _counts(pairs: pl.DataFrame, patients: Mapping[str, str]) -> str:
    if pairs.is_empty():
        return "none"
    by_kind = dict(pairs["kind"].value_counts().rows())
    counts = [f"{by_kind[kind]:,} {kind}" for kind in KINDS if kind in by_kind]
    owners = [
        (patients.get(one), patients.get(two)) for one, two in pairs["isic_id", "other_id"].rows()
    ]
    different = sum(one is not None and two is not None and one != two for one, two in owners)
    if different:
        counts.append(f"{different:,} of different patients")
    examples = [
        f"{one} = {two} ({kind})"
        for kind, one, two in pairs["kind", "isic_id", "other_id"].head(EXAMPLES).rows()
    ]
    return f"{', '.join(counts)}; {', '.join(examples)}"


def patients_of(tables: Iterable[pl.DataFrame]) -> dict[str, str]:
    """Return the patient by id, for the rows that have one."""
    found: dict[str, str] = {}
    for table in tables:
        if schema.PATIENT in table.columns:
            found |= dict(table.select(schema.ID, schema.PATIENT).drop_nulls().rows())
    return found


def shared(train: pl.DataFrame, test: pl.DataFrame, column: str) -> list[str]:
    """Return the values of a column that both tables have, sorted."""
    if column not in train.columns or column not in test.columns:
        return []
    return sorted(set(train[column].drop_nulls()) & set(test[column].drop_nulls()))


def _write(path: Path, pairs: pl.DataFrame) -> None:
    if is_parquet(path):
        write_parquet(path, pairs)
        return
    with atomic_path(path) as temporary:
        pairs.write_csv(temporary)
