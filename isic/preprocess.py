"""From JPEG bytes to the uint8 pixels that every model sees: one code path for validation, parity and inference."""

from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 4096 * 4096

INTERPOLATION = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}

Pixels = NDArray[np.uint8]


class ImageError(Exception):
    """One image cannot be used. Its text is the reason, short enough for a table."""


class PreprocessSpec(BaseModel):
    """What happens to an image before the backbone. Stored in every checkpoint and manifest.

    Decoding and resizing happen on the host and give uint8; mean and std are applied inside the model to values
    scaled to [0, 1].
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=8, le=2048)
    interpolation: Literal["linear", "cubic", "area"] = "linear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    color_order: Literal["RGB"] = "RGB"


def decode(data: bytes) -> Pixels:
    """Decodes an image file's bytes to uint8 [height, width, 3], RGB.

    Raises:
        ImageError: empty, truncated, too large, or not an image.
    """
    if not data:
        raise ImageError("zero bytes")
    buffer = np.frombuffer(data, dtype=np.uint8)
    # libjpeg paints the missing part of a cut file grey and calls it a success, so look for the end marker.
    if data[:2] == b"\xff\xd8" and data.rfind(b"\xff\xd9") < len(data) // 2:
        raise ImageError("truncated JPEG")
    try:
        image = cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise ImageError(f"does not decode: {error.err}") from None
    if image is None:
        raise ImageError("not an image")
    return np.asarray(image, dtype=np.uint8)


def resize(image: Pixels, spec: PreprocessSpec, out: Pixels | None = None) -> Pixels:
    """Resizes uint8 [h, w, 3] to [size, size, 3], into `out` where it is given."""
    interpolation = INTERPOLATION[spec.interpolation]
    return np.asarray(cv2.resize(image, (spec.size, spec.size), dst=out, interpolation=interpolation), dtype=np.uint8)


def decode_into(data: bytes, spec: PreprocessSpec, out: Pixels) -> None:
    """Decodes and resizes one image into `out`, uint8 [size, size, 3] and contiguous. Raises ImageError."""
    resize(decode(data), spec, out)
