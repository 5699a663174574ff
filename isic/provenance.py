"""Images and patients that a model has learned from, to keep out-of-fold scores honest.

A model has seen the rows it was trained on, the rows its epoch was selected on, and all rows that
its initial weights had seen. A score is out of fold only if the model has seen neither the image
nor the patient.
"""

from pathlib import Path

import polars as pl

from isic import schema
from isic.metadata import with_patient
from isic.runtime.errors import UserError
from isic.tables import parquet_metadata, read_parquet, reading, write_parquet

SEEN_KEYS = (schema.ID, schema.PATIENT)
SEEN_SCHEMA = {key: pl.String() for key in SEEN_KEYS}
SEEN_VERSION = "2"
"""Version 1 also listed held-out rows."""

Seen = pl.DataFrame
"""`isic_id` and `patient_id`, String, of every image a model has learned from."""

NOTHING: Seen = pl.DataFrame(schema=SEEN_SCHEMA)


def seen_rows(table: pl.DataFrame, *inherited: Seen) -> Seen:
    """Return the images and patients of `table` and of the `inherited` lists, sorted."""
    parts = [with_patient(table).select(SEEN_KEYS), *inherited]
    return pl.concat(parts).unique().sort(SEEN_KEYS)


def write_seen(path: Path, seen: Seen) -> None:
    """Write a list of seen images; equal lists give equal bytes."""
    write_parquet(path, seen, {"version": SEEN_VERSION})


def read_seen(path: Path) -> Seen:
    """Read a list of seen images.

    Raises:
        UserError: the file is missing, is not such a list, or comes from an earlier version.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing, so the images that this model has learned from are unknown; "
            "copy it from the folder in which the model was trained, or train the model again"
        )
    version = parquet_metadata(path).get("version")
    # With held-out rows in the list, no score would count as out of fold.
    if version != SEEN_VERSION:
        raise UserError(
            f"{path} was written by an earlier version, which did not separate training rows "
            "from held-out rows; train the model again"
        )
    with reading(path):
        return read_parquet(path, SEEN_KEYS).cast(SEEN_SCHEMA)  # type: ignore[arg-type]


def rows_seen(metadata: pl.DataFrame, seen: Seen) -> pl.DataFrame:
    """Return the rows of `metadata` whose image or patient is in `seen`."""
    known = pl.any_horizontal(pl.col(key).is_in(seen[key].implode()) for key in SEEN_KEYS)
    return metadata.filter(with_patient(metadata).select(known).to_series())


def refuse_seen(held_out: pl.DataFrame, seen: Seen, model: str, remedy: str) -> None:
    """Raise a UserError if a model has learned from held-out images or patients.

    Args:
        held_out: `isic_id` and optionally `patient_id`.
        seen: the model's list.
        model: subject of the error message, such as "the weights in x".
        remedy: end of the error message, such as "use --pretrained y".
    """
    leaked = rows_seen(held_out, seen)
    if len(leaked):
        raise UserError(
            f"{model} learned from {len(leaked):,} of the {len(held_out):,} held-out rows or from "
            f"their patients, the first is {leaked[schema.ID][0]}; "
            f"their scores would not be out of fold: {remedy}"
        )
