"""Image files with transparency, 16 bits, CMYK or a turn: their pixels as RGB of 8 bits."""

from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from isic.headers import (
    TAG_BITS,
    TAG_EXTRA,
    TAG_FORMAT,
    TAG_PHOTOMETRIC,
    TAG_SAMPLES,
    ImageError,
    chunks,
    is_bmp,
    is_jpeg,
    is_png,
    is_tiff,
    orientation,
    png_depth,
    tiff_tags,
)

Bytes = NDArray[np.uint8]

PNG_GREY = 0
"""The colour type of grey without alpha (PNG specification, table 11.1)."""
PNG_OPAQUE = frozenset((PNG_GREY, 2, 3))
"""Colour types without an alpha channel: grey, RGB, palette."""

TIFF_WHITE_IS_ZERO = 0
TIFF_PHOTOMETRICS = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr"}
TIFF_BITS = frozenset((1, 2, 4, 8, 16))
TIFF_STRAIGHT, TIFF_PREMULTIPLIED = 2, 1
"""Values of ExtraSamples: alpha, of which the colours are not or are multiples already."""

TURNS = {
    1: (False, ()),
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}
"""By EXIF orientation: whether rows and columns are swapped, and the axes reversed after it."""


def is_plain(data: bytes) -> bool:
    """Return whether OpenCV's own conversion to RGB is the one that this toolkit defines."""
    if is_jpeg(data) or is_bmp(data):
        return True
    if not is_png(data):
        return False
    bits, kind = png_depth(data)
    return bits <= 8 and kind in PNG_OPAQUE and b"tRNS" not in data and b"eXIf" not in data


def decode_layers(data: bytes, background: int) -> Bytes:
    """Decode a PNG, WebP or TIFF file of any channels to uint8 [height, width, 3], RGB.

    16 bits are divided by 257 and rounded. Transparent pixels are mixed with the background. The
    image is turned as its EXIF data or TIFF tag says. Colour profiles are not applied.

    Args:
        background: grey value, 0 to 255.

    Raises:
        ImageError: damaged, or a kind of pixels without a defined colour.
    """
    if is_tiff(data):
        return _decode_tiff(data, background)
    image = to_8_bits(read_unchanged(data))
    alpha = _grey_alpha(data, image) if is_png(data) else None
    return turn(to_rgb(image, background, alpha), orientation(data))


def read_rgb(data: bytes) -> Bytes:
    """Decode to uint8 [height, width, 3] in the way of OpenCV. Raise ImageError."""
    return cast(Bytes, _read(data, cv2.IMREAD_COLOR_RGB))


def read_unchanged(data: bytes) -> NDArray[np.generic]:
    """Decode to [height, width] or [height, width, C] in BGR or BGRA. Raise ImageError."""
    return _read(data, cv2.IMREAD_UNCHANGED)


def _read(data: bytes, flags: int) -> NDArray[np.generic]:
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"does not decode: {error.err}") from None
    if image is None:
        raise ImageError("does not decode")
    return image


def _grey_alpha(data: bytes, image: Bytes) -> Bytes | None:
    """Return the alpha of a grey PNG that names one value as transparent, else None."""
    # OpenCV applies such a chunk to RGB and palettes, and drops it for grey.
    bits, kind = png_depth(data)
    if kind != PNG_GREY or image.ndim != 2:
        return None
    for name, content in chunks(data):
        if name == b"tRNS" and len(content) == 2:
            transparent = int.from_bytes(content)
            scaled = round(transparent * 255 / (2**bits - 1))
            return np.where(image == scaled, 0, 255).astype(np.uint8)
    return None


def _decode_tiff(data: bytes, background: int) -> Bytes:
    tags = tiff_tags(data)
    photometric = tags.get(TAG_PHOTOMETRIC, 1)
    bits = tags.get(TAG_BITS, 1)
    _refuse_tiff(tags, photometric, bits)
    image = read_unchanged(data)
    if bits == 16 and photometric == TIFF_WHITE_IS_ZERO:  # inverted by OpenCV up to 8 bits only
        image = np.iinfo(np.uint16).max - image
    extra = tags.get(TAG_EXTRA)
    alpha = None if extra in (TIFF_STRAIGHT, TIFF_PREMULTIPLIED) else _opaque(image)
    # Up to 8 bits OpenCV, that is libtiff's RGBA interface, has multiplied the colours by alpha.
    premultiplied = bits <= 8 or extra == TIFF_PREMULTIPLIED
    return to_rgb(to_8_bits(image), background, alpha, premultiplied)


def _refuse_tiff(tags: dict[int, int], photometric: int, bits: int) -> None:
    kind = TIFF_PHOTOMETRICS.get(photometric)
    if kind is None:
        raise ImageError("a TIFF of other colours than grey, RGB, palette, CMYK and YCbCr")
    if tags.get(TAG_FORMAT, 1) != 1 or bits not in TIFF_BITS:
        raise ImageError("a TIFF of other numbers than 8 or 16 bits without sign")
    if kind == "grey" and tags.get(TAG_SAMPLES, 1) > 1:
        raise ImageError("a grey TIFF with more than one channel")


def _opaque(image: NDArray[np.generic]) -> Bytes:
    return np.full(image.shape[:2], 255, np.uint8)


def to_8_bits(image: NDArray[np.generic]) -> Bytes:
    """Return values of 16 bits divided by 257 and rounded, and those of 8 bits as they are."""
    if image.dtype == np.uint8:
        return cast(Bytes, image)
    if image.dtype == np.uint16:
        return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    raise ImageError(f"values of the type {image.dtype}, not of 8 or 16 bits")


def to_rgb(
    image: Bytes, background: int, alpha: Bytes | None = None, premultiplied: bool = False
) -> Bytes:
    """Return RGB, contiguous uint8 [height, width, 3], over a grey background.

    Args:
        image: [height, width] grey, or [height, width, 3 or 4] BGR or BGRA.
        background: grey value, 0 to 255.
        alpha: [height, width] in place of the image's own.
        premultiplied: whether the colours are multiplied by alpha already.
    """
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if alpha is None and image.shape[2] == 4:
        alpha = image[..., 3]
    colours = image[..., 2::-1]
    if alpha is None or alpha.min() == 255:
        return np.ascontiguousarray(colours)
    weight = alpha[..., None].astype(np.uint32)
    scaled = colours * (np.uint32(255) if premultiplied else weight)
    mixed = (scaled + background * (255 - weight) + 127) // 255
    rgb: Bytes = np.minimum(mixed, 255).astype(np.uint8)
    return rgb


def turn(image: Bytes, orientation: int) -> Bytes:
    """Turn [height, width, 3] as an EXIF orientation says; unknown ones leave it as it is."""
    swapped, axes = TURNS.get(orientation, TURNS[1])
    if swapped:
        image = image.swapaxes(0, 1)
    turned: Bytes = np.ascontiguousarray(np.flip(image, axes))
    return turned
