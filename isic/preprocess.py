"""Bytes of image files to uint8 pixels: one code path for training, parity check and inference."""

from collections.abc import Sequence
from typing import Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from isic.headers import UNKNOWN_SIZE, ImageError, image_size, is_whole_jpeg
from isic.layers import decode_layers, is_plain, read_rgb
from isic.views import REVERSED_AXES, TRANSPOSED, VIEWS, is_transposed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# More than cameras produce (6,000 x 4,000); decoding takes three bytes of memory per pixel.
MAX_PIXELS = 8192 * 4096

FLIP_CODES = {(0,): 0, (1,): 1, (0, 1): -1}
"""OpenCV's code of a flip by the axes that it reverses."""
INTERPOLATION = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}

WHITE, BLACK = 255, 0
"""Backgrounds of transparent pixels, of images and of masks."""
MASK_THRESHOLD = 127
"""Mask values above this are lesion."""


Pixels = NDArray[np.uint8]


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


def decode(data: bytes, size: tuple[int, int] = UNKNOWN_SIZE, background: int = WHITE) -> Pixels:
    """Decode the bytes of an image file to uint8 [height, width, 3], RGB.

    JPEG, PNG, WebP, TIFF and BMP, of any colour space. Transparent pixels are mixed with the
    background, 16 bits are divided by 257 and rounded, and the image is turned as its EXIF data
    says; see `isic.layers`.

    Args:
        size: height and width from `header_size`, if the header was read before.
        background: grey value, 0 to 255.

    Raises:
        ImageError: empty, truncated, more than MAX_PIXELS, damaged, or no image of these kinds.
    """
    # From the header, which bounds the memory.
    height, width = size if size != UNKNOWN_SIZE and is_whole_jpeg(data) else image_size(data)
    if height * width > MAX_PIXELS:
        raise ImageError(f"claims {width} x {height} pixels, more than {MAX_PIXELS:,}")
    return read_rgb(data) if is_plain(data) else decode_layers(data, background)


def decode_mask(data: bytes) -> Pixels:
    """Decode a mask as `decode` does, with transparent pixels as outside of the lesion."""
    return decode(data, background=BLACK)


def check_mask(mask: bytes, image: bytes) -> str | None:
    """Check the mask file of a lesion against its image file.

    Returns:
        Both sizes if they differ, since training stretches the mask to the image; else None.

    Raises:
        ImageError: one does not decode, or the mask has values but none above MASK_THRESHOLD.
    """
    mask_pixels = decode_mask(mask)
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
