"""JPEG or PNG bytes to uint8 pixels: one code path for training, parity check and inference."""

from collections.abc import Sequence
from typing import Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from isic.views import REVERSED_AXES, TRANSPOSED, VIEWS, is_transposed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# More than cameras produce (6,000 x 4,000); decoding takes three bytes of memory per pixel.
MAX_PIXELS = 8192 * 4096

JPEG_START = b"\xff\xd8"
JPEG_END = b"\xff\xd9"
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of the segment that holds height and width (ITU-T T.81, table B.1)."""
JPEG_BARE = frozenset((0x01, *range(0xD0, 0xD9)))
"""Markers that are not followed by a length."""
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"IEND"
PNG_HEADER = 24
"""Bytes up to the end of width and height."""

UNKNOWN_SIZE = (0, 0)
"""Height and width of an image whose header was not read."""

FLIP_CODES = {(0,): 0, (1,): 1, (0, 1): -1}
"""OpenCV's code of a flip by the axes that it reverses."""
INTERPOLATION = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}

MASK_THRESHOLD = 127
"""Mask values above this are lesion."""

Pixels = NDArray[np.uint8]


class ImageError(Exception):
    """One image cannot be used. The message is the reason, short enough for a table."""


class PreprocessSpec(BaseModel):
    """Preprocessing of an image before the backbone; stored in every checkpoint and manifest.

    Decoding and resizing run on the host and give uint8. The model itself scales to [0, 1] and
    applies mean and std.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=8, le=2048)
    interpolation: Literal["linear", "cubic", "area"] = "linear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    color_order: Literal["RGB"] = "RGB"


def decode(data: bytes, size: tuple[int, int] = UNKNOWN_SIZE) -> Pixels:
    """Decode a JPEG or PNG file's bytes, of any colour space, to uint8 [height, width, 3], RGB.

    Args:
        size: height and width from `header_size`, if the header was read before.

    Raises:
        ImageError: empty, truncated, more than MAX_PIXELS, damaged, or neither JPEG nor PNG.
    """
    # From the header, which bounds the memory.
    height, width = size if size != UNKNOWN_SIZE and _is_whole_jpeg(data) else image_size(data)
    if height * width > MAX_PIXELS:
        raise ImageError(f"claims {width} x {height} pixels, more than {MAX_PIXELS:,}")
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise ImageError(f"does not decode: {error.err}") from None
    if image is None:
        raise ImageError("does not decode")
    return cast(Pixels, image)


def image_size(data: bytes) -> tuple[int, int]:
    """Return height and width from the header of a whole JPEG or PNG file. Raise ImageError."""
    # The end marker is checked too: libjpeg fills the missing part of a truncated file with grey
    # and reports success.
    if not data:
        raise ImageError("zero bytes")
    if data.startswith(JPEG_START):
        frame = _jpeg_frame(data)
        if data.rfind(JPEG_END, frame) < 0:
            raise ImageError("truncated JPEG")
        return _jpeg_size(data, frame)
    if data.startswith(PNG_START):
        if data.rfind(PNG_END) < PNG_HEADER:
            raise ImageError("truncated PNG")
        return _png_size(data)
    raise ImageError("not an image")


def header_size(start: bytes) -> tuple[int, int]:
    """Return height and width from a file's first bytes, UNKNOWN_SIZE if they are further in."""
    if start.startswith(PNG_START) and len(start) >= PNG_HEADER:
        return _png_size(start)
    try:
        return _jpeg_size(start, _jpeg_frame(start))
    except ImageError:
        return UNKNOWN_SIZE


def _is_whole_jpeg(data: bytes) -> bool:
    """Check the markers at both ends. Other bytes may follow the end, which `image_size` finds."""
    return data.startswith(JPEG_START) and data.endswith(JPEG_END)


def _jpeg_size(data: bytes, frame: int) -> tuple[int, int]:
    return int.from_bytes(data[frame + 5 : frame + 7]), int.from_bytes(data[frame + 7 : frame + 9])


def _png_size(data: bytes) -> tuple[int, int]:
    return int.from_bytes(data[20:24]), int.from_bytes(data[16:20])


def _jpeg_frame(data: bytes) -> int:
    """Return the offset of the frame header, past earlier segments such as a thumbnail's."""
    at = data.find(b"\xff", 2)
    while 0 <= at <= len(data) - 9:
        marker = data[at + 1]
        if marker in JPEG_FRAMES:
            return at
        if marker == 0xFF:  # padding
            at += 1
        else:
            length = 0 if marker in JPEG_BARE else int.from_bytes(data[at + 2 : at + 4])
            at = data.find(b"\xff", at + 2 + length)  # like libjpeg, skip bytes between segments
    raise ImageError("truncated JPEG")


def check_mask(mask: bytes, image: bytes) -> str | None:
    """Check the mask file of a lesion against its image file.

    Returns:
        Both sizes if they differ, since training stretches the mask to the image; else None.

    Raises:
        ImageError: one does not decode, or the mask has values but none above MASK_THRESHOLD.
    """
    mask_pixels = decode(mask)
    brightest = int(mask_pixels[..., 0].max())
    if mask_pixels.any() and brightest <= MASK_THRESHOLD:
        raise ImageError(f"its brightest red value is {brightest}; in the lesion it must be 255")
    height, width = mask_pixels.shape[:2]
    image_height, image_width = decode(image).shape[:2]
    if (height, width) == (image_height, image_width):
        return None
    return f"mask {width} x {height}, image {image_width} x {image_height}"


def resize(image: Pixels, spec: PreprocessSpec, out: Pixels | None = None) -> Pixels:
    """Resize uint8 [h, w, 3] to [size, size, 3], into `out` if given."""
    interpolation = INTERPOLATION[spec.interpolation]
    resized = cv2.resize(image, (spec.size, spec.size), dst=out, interpolation=interpolation)
    return cast(Pixels, resized)


def decode_into(
    data: bytes, spec: PreprocessSpec, out: Pixels, size: tuple[int, int] = UNKNOWN_SIZE
) -> None:
    """Decode and resize into `out`, contiguous uint8 [size, size, 3]; otherwise as `decode`."""
    resize(decode(data, size), spec, out)


def write_views(image: Pixels, tta: str, out: Sequence[Pixels] | NDArray[np.uint8]) -> None:
    """Write every view of a square image in the order of `VIEWS[tta]`, without the GIL.

    Args:
        image: uint8 [size, size, 3].
        tta: a key of VIEWS.
        out: contiguous uint8 [V, size, size, 3], or a sequence of V such rows. `out[0]` may be
            `image` itself, which is then not copied.
    """
    rows = dict(zip(VIEWS[tta], out, strict=True))
    for row in rows.values():
        # Otherwise OpenCV would silently write into new memory.
        assert row.shape == image.shape and row.dtype == np.uint8 and row.flags.c_contiguous
    # At 224 px a transposition takes 10 us, a flip 2 to 4 us and a rotation 11 to 13 us, so the
    # quarter turns are flips of one transposition.
    if TRANSPOSED in rows:
        cv2.transpose(image, rows[TRANSPOSED])
    for view, row in rows.items():
        axes = REVERSED_AXES[view]
        if axes:
            cv2.flip(rows[TRANSPOSED] if is_transposed(view) else image, FLIP_CODES[axes], row)
    if out[0] is not image:
        np.copyto(out[0], image)
