"""The lesions that an ensemble scored worst, and the other lesions of their patients."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import polars as pl

from isic import schema
from isic.images import ImageStore
from isic.preprocess import Pixels, PreprocessSpec

NUM_CASES = 8
NUM_OTHERS = 6
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Lesion:
    """One lesion on the page."""

    name: str
    target: int
    score: float


@dataclass(frozen=True)
class Case:
    """A wrongly scored lesion."""

    lesion: Lesion
    row: dict[str, Any]
    """Its metadata as in the file."""
    beaten: float
    """Share of the other class that scores lower."""
    patient: str | None
    rank: int
    """Lesions of its patient that score at least as high, itself included."""
    num_lesions: int
    others: tuple[Lesion, ...]
    """The patient's highest-scored other lesions."""


def worst_misses(oof: pl.DataFrame, metadata: pl.DataFrame, number: int = NUM_CASES) -> list[Case]:
    """Return the malignant lesions with the lowest scores, the lowest first.

    Args:
        oof: `isic_id`, `target`, `blend` and `patient_id`, the row's own id if that is unknown.
    """
    return _cases(oof, metadata, 1, number)


def worst_false_alarms(
    oof: pl.DataFrame, metadata: pl.DataFrame, number: int = NUM_CASES
) -> list[Case]:
    """Return the benign lesions with the highest scores, the highest first."""
    return _cases(oof, metadata, 0, number)


def _cases(oof: pl.DataFrame, metadata: pl.DataFrame, label: int, number: int) -> list[Case]:
    is_class = pl.col(schema.TARGET) == label
    # Malignant lesions are wrong if they score low, benign ones if they score high.
    worst_first = [label == 0, False]
    wrong = oof.filter(is_class).sort("blend", schema.ID, descending=worst_first)
    other_class = oof.filter(~is_class)["blend"].sort()
    return [_case(row, oof, metadata, other_class) for row in wrong.head(number).to_dicts()]


def _case(
    scored: dict[str, Any], oof: pl.DataFrame, metadata: pl.DataFrame, other_class: pl.Series
) -> Case:
    """Return the case of a row of `oof`; `other_class` has the sorted scores of the other class."""
    name = scored[schema.ID]
    score = scored["blend"]
    lesions = oof.filter(pl.col(schema.PATIENT) == scored[schema.PATIENT])
    others = (
        lesions.filter(pl.col(schema.ID) != name)
        .sort("blend", schema.ID, descending=[True, False])
        .head(NUM_OTHERS)
        .select(schema.ID, schema.TARGET, "blend")
    )
    row = metadata.row(by_predicate=pl.col(schema.ID) == name, named=True)
    # Ties do not count as beaten.
    num_beaten = np.searchsorted(other_class.to_numpy(), score)
    return Case(
        lesion=Lesion(name, scored[schema.TARGET], score),
        row=row,
        beaten=float(num_beaten / len(other_class)),
        patient=row.get(schema.PATIENT),
        rank=int((lesions["blend"] >= score).sum()),
        num_lesions=len(lesions),
        others=tuple(Lesion(*values) for values in others.iter_rows()),
    )


@dataclass(frozen=True)
class Picture:
    """A thumbnail as a data URI, or the reason that there is none."""

    uri: str = ""
    reason: str = ""


def pictures(images: ImageStore, names: Sequence[str], side: int) -> dict[str, Picture]:
    """Return thumbnails by id, square as the model sees the images."""
    pixels, failed = images.load(names, PreprocessSpec(size=side, interpolation="area"))
    return {
        name: Picture(reason=failed[row]) if row in failed else Picture(jpeg_uri(pixels[row]))
        for row, name in enumerate(names)
    }


def jpeg_uri(image: Pixels) -> str:
    """Return an image uint8 [h, w, 3] as a data URI."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")
