"""From JPEG bytes to the uint8 pixels that every model sees: one code path for validation, parity and inference."""

from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 8192 * 4096
"""Above what dermatoscopes and cameras give (6,000 x 4,000); a thread needs three bytes for each while it decodes."""

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of the segment with height and width. The three left out lie in their range and mean something else."""
JPEG_BARE = frozenset((0x01, *range(0xD0, 0xD9)))
"""Markers that no length follows."""
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"

INTERPOLATION = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}

MASK_THRESHOLD = 127
"""Values of a mask above it are lesion."""

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
    """Decodes a JPEG or PNG file's bytes to uint8 [height, width, 3], RGB.

    Grey, CMYK, palette, 16-bit and transparent images become RGB. What the file claims to be is read from its header
    first, so that memory is bounded whatever it claims.

    Raises:
        ImageError: empty, truncated, more than MAX_PIXELS, damaged, or neither JPEG nor PNG.
    """
    height, width = image_size(data)
    if height * width > MAX_PIXELS:
        raise ImageError(f"claims {width} x {height} pixels, more than {MAX_PIXELS:,}")
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise ImageError(f"does not decode: {error.err}") from None
    if image is None:
        raise ImageError("does not decode")
    return np.asarray(image, dtype=np.uint8)


def image_size(data: bytes) -> tuple[int, int]:
    """Returns height and width from the header of a JPEG or PNG file that has its end.

    libjpeg paints the missing part of a cut file grey and calls it a success, so the end marker is looked for here.
    Raises ImageError.
    """
    if not data:
        raise ImageError("zero bytes")
    if data.startswith(JPEG_START):
        frame = _jpeg_frame(data)
        if data.rfind(JPEG_END, frame) < 0:
            raise ImageError("truncated JPEG")
        return int.from_bytes(data[frame + 5 : frame + 7]), int.from_bytes(
            data[frame + 7 : frame + 9]
        )
    if data.startswith(PNG_START):
        if data.rfind(PNG_END) < 24:
            raise ImageError("truncated PNG")
        return int.from_bytes(data[20:24]), int.from_bytes(data[16:20])
    raise ImageError("not an image")


def _jpeg_frame(data: bytes) -> int:
    """Returns where the frame header starts: segments before it, such as a thumbnail's, are stepped over."""
    at = data.find(b"\xff", 2)
    while 0 <= at <= len(data) - 9:
        marker = data[at + 1]
        if marker in JPEG_FRAMES:
            return at
        if marker == 0xFF:  # padding
            at += 1
        else:
            length = 0 if marker in JPEG_BARE else int.from_bytes(data[at + 2 : at + 4])
            at = data.find(
                b"\xff", at + 2 + length
            )  # libjpeg, too, skips what lies between segments
    raise ImageError("truncated JPEG")


def check_mask(mask: bytes, image: bytes) -> str | None:
    """Checks the mask file of a lesion against its image file.

    Returns:
        Both sizes if they differ: the mask is then stretched to the image.

    Raises:
        ImageError: one does not decode, or the mask has values but none that counts as lesion.
    """
    drawn, pixels = decode(mask), decode(image)
    brightest = int(drawn[..., 0].max())
    if drawn.any() and brightest <= MASK_THRESHOLD:
        raise ImageError(f"its brightest red value is {brightest}; in the lesion it must be 255")
    if drawn.shape == pixels.shape:
        return None
    (height, width), (image_height, image_width) = drawn.shape[:2], pixels.shape[:2]
    return f"mask {width} x {height}, image {image_width} x {image_height}"


def resize(image: Pixels, spec: PreprocessSpec, out: Pixels | None = None) -> Pixels:
    """Resizes uint8 [h, w, 3] to [size, size, 3], into `out` where it is given."""
    interpolation = INTERPOLATION[spec.interpolation]
    return np.asarray(
        cv2.resize(image, (spec.size, spec.size), dst=out, interpolation=interpolation),
        dtype=np.uint8,
    )


def decode_into(data: bytes, spec: PreprocessSpec, out: Pixels) -> None:
    """Decodes and resizes one image into `out`, uint8 [size, size, 3] and contiguous. Raises ImageError."""
    resize(decode(data), spec, out)
