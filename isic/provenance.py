"""Which images and patients a model has learned from, so that no score passes for out of fold.

A model has seen the rows it was trained on, the rows its epoch was chosen on, and all that the weights
it started from had seen. Whenever it scores a row as "out of fold", it has seen neither the row's image
nor its patient.
"""

from pathlib import Path

import polars as pl

from isic import schema
from isic.errors import UserError
from isic.files import write_parquet
from isic.metadata import with_patient
from isic.tables import parquet_metadata, read_parquet, reading

SEEN_FILE = "trained_on.parquet"
"""Beside a checkpoint, in its `backbone/`, and beside the embeddings of its fold."""
KEYS = (schema.ID, schema.PATIENT)
COLUMNS = {key: pl.String() for key in KEYS}
VERSION = "2"
"""Version 1 also listed the rows that were held out."""

Seen = pl.DataFrame
"""`isic_id` and `patient_id`, String, of every image a model has learned from."""

NOTHING: Seen = pl.DataFrame(schema=COLUMNS)


def seen_rows(table: pl.DataFrame, *inherited: Seen) -> Seen:
    """Returns the images of `table` (and their patients) together with those of further lists, sorted."""
    parts = [with_patient(table).select(KEYS), *inherited]
    return pl.concat(parts).unique().sort(KEYS)


def write_seen(path: Path, seen: Seen) -> None:
    """Writes a list of images and patients; equal lists give equal bytes."""
    write_parquet(path, seen, {"version": VERSION})


def read_seen(path: Path) -> Seen:
    """Reads a list of images and patients.

    Raises:
        UserError: there is no such file, it is not such a list, or an earlier version wrote it.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing, so nobody can know which images this model has learned from; "
            "copy it from the folder in which the model was trained, or train the model again"
        )
    version = parquet_metadata(path).get("version")
    if version != VERSION:
        raise UserError(
            f"{path} was written by an earlier version, which did not tell training rows from "
            "held-out rows; train the model again"
        )
    with reading(path):
        return read_parquet(path, KEYS).cast(COLUMNS)  # type: ignore[arg-type]


def rows_seen(metadata: pl.DataFrame, seen: Seen) -> pl.DataFrame:
    """Returns the rows of `metadata` whose image or patient is in `seen`."""
    known = pl.any_horizontal(pl.col(key).is_in(seen[key].implode()) for key in KEYS)
    return metadata.filter(with_patient(metadata).select(known).to_series())


def refuse_seen(held_out: pl.DataFrame, seen: Seen, model: str, remedy: str) -> None:
    """Raises a UserError if a model has learned from images or patients that are held out from it.

    Args:
        held_out: `isic_id` and perhaps `patient_id` of the rows to be scored as out of fold.
        seen: the list of the model.
        model: the subject of the sentence, such as "the weights in x".
        remedy: the end of the sentence, such as "use --pretrained y".
    """
    leaked = rows_seen(held_out, seen)
    if len(leaked):
        raise UserError(
            f"{model} learned from {len(leaked):,} of the {len(held_out):,} held-out rows or from "
            f"their patients, the first is {leaked[schema.ID][0]}; their scores would not be out of "
            f"fold: {remedy}"
        )
