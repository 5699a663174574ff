"""The lesions that an ensemble got most wrong, what is known of them, and the patient's other lesions."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import polars as pl

from isic import schema
from isic.images import ImageStore, decode_pool
from isic.preprocess import PreprocessSpec

NUM_CASES = 8
NUM_OTHERS = 6
QUALITY = 85
"""Of the JPEGs on the page."""


@dataclass(frozen=True)
class Lesion:
    """One lesion on the page."""

    name: str
    target: int
    score: float


@dataclass(frozen=True)
class Case:
    """A lesion that stands far from where it should."""

    lesion: Lesion
    row: dict[str, Any]
    """Its metadata as the file has them."""
    beaten: float
    """Share of the other class that scores lower."""
    patient: str | None
    rank: int
    """Lesions of its patient that score at least as high, itself included."""
    num_lesions: int
    others: tuple[Lesion, ...]
    """The patient's highest-scored other lesions."""


def worst_misses(oof: pl.DataFrame, metadata: pl.DataFrame, number: int = NUM_CASES) -> list[Case]:
    """Returns the malignant lesions with the lowest scores, the lowest first.

    Args:
        oof: `isic_id`, `target`, `blend` and `patient_id`, filled in where it is not known.
        metadata: the training table.
    """
    return _cases(oof, metadata, 1, number)


def worst_false_alarms(
    oof: pl.DataFrame, metadata: pl.DataFrame, number: int = NUM_CASES
) -> list[Case]:
    """Returns the benign lesions with the highest scores, the highest first. Arguments as above."""
    return _cases(oof, metadata, 0, number)


def _cases(oof: pl.DataFrame, metadata: pl.DataFrame, label: int, number: int) -> list[Case]:
    wrong = oof.filter(pl.col(schema.TARGET) == label).sort(
        "blend", schema.ID, descending=[label == 0, False]
    )
    other_class = np.sort(oof.filter(pl.col(schema.TARGET) != label)["blend"].to_numpy())
    cases = []
    for name, score, patient in (
        wrong.head(number).select(schema.ID, "blend", schema.PATIENT).iter_rows()
    ):
        lesions = oof.filter(pl.col(schema.PATIENT) == patient)
        others = lesions.filter(pl.col(schema.ID) != name).sort(
            "blend", schema.ID, descending=[True, False]
        )
        row = metadata.row(by_predicate=pl.col(schema.ID) == name, named=True)
        cases.append(
            Case(
                Lesion(name, label, score),
                row,
                float(np.searchsorted(other_class, score) / len(other_class)),
                row.get(schema.PATIENT),
                int((lesions["blend"] >= score).sum()),
                len(lesions),
                tuple(
                    Lesion(*values)
                    for values in others.head(NUM_OTHERS).select(_LESION).iter_rows()
                ),
            )
        )
    return cases


_LESION = (schema.ID, schema.TARGET, "blend")


@dataclass(frozen=True)
class Picture:
    """A thumbnail as a data URI, or the reason why there is none."""

    uri: str = ""
    reason: str = ""


def pictures(images: ImageStore, names: Sequence[str], side: int) -> dict[str, Picture]:
    """Reads thumbnails, square as the model sees the images.

    Args:
        side: in pixels.
    """
    pixels = np.empty((len(names), side, side, 3), dtype=np.uint8)
    with decode_pool(1) as pool:
        failed = images.decode(names, PreprocessSpec(size=side, interpolation="area"), pixels, pool)
    return {
        name: Picture(reason=failed[row]) if row in failed else Picture(_jpeg_uri(pixels[row]))
        for row, name in enumerate(names)
    }


def _jpeg_uri(image: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    _, data = cv2.imencode(
        ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    )
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")
