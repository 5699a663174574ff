"""Formats of image files: the size in their first bytes, and tags that change the pixels."""

import struct
from collections.abc import Callable, Iterator

UNKNOWN_SIZE = (0, 0)
"""Height and width of an image whose header was not read."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
"""Endings of image files, in any case; the content decides how one is decoded."""

JPEG_START = b"\xff\xd8"
JPEG_END = b"\xff\xd9"
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of the segment that holds height and width (ITU-T T.81, table B.1)."""
JPEG_BARE = frozenset((0x01, *range(0xD0, 0xD9)))
"""Markers that are not followed by a length."""
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"IEND"
PNG_HEADER = 26
"""Bytes up to the end of width, height, bit depth and colour type."""
WEBP_HEADER = 30
"""Bytes up to the end of width and height in each of its three kinds (RFC 9649)."""
BMP_START = b"BM"
BMP_HEADER = 26
TIFF_STARTS = {b"II*\0": "<", b"MM\0*": ">"}
"""First bytes of a TIFF file, with the byte order for `struct`."""

# Tags of TIFF 6.0, and of EXIF, which is stored as a small TIFF file.
TAG_WIDTH, TAG_HEIGHT, TAG_BITS, TAG_PHOTOMETRIC = 256, 257, 258, 262
TAG_ORIENTATION, TAG_SAMPLES, TAG_EXTRA, TAG_FORMAT = 274, 277, 338, 339
TAG_TYPES = {1: "B", 3: "H", 4: "I"}
"""Types of whole numbers, as `struct` names them."""
MAX_TAGS = 512


class ImageError(Exception):
    """One image cannot be used. The message is the reason, short enough for a table."""


def image_size(data: bytes) -> tuple[int, int]:
    """Return height and width from the header of a whole image file. Raise ImageError."""
    if not data:
        raise ImageError("zero bytes")
    for starts, size in SIZES:
        if starts(data):
            return size(data)
    raise ImageError("not an image")


def header_size(start: bytes) -> tuple[int, int]:
    """Return height and width from the first bytes of a JPEG or PNG file.

    UNKNOWN_SIZE if they are further in.
    """
    if start.startswith(PNG_START) and len(start) >= PNG_HEADER:
        return _png_size(start)
    try:
        return _jpeg_size(start, _jpeg_frame(start))
    except ImageError:
        return UNKNOWN_SIZE


def is_jpeg(data: bytes) -> bool:
    return data.startswith(JPEG_START)


def is_png(data: bytes) -> bool:
    return data.startswith(PNG_START)


def is_webp(data: bytes) -> bool:
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP"


def is_tiff(data: bytes) -> bool:
    return data[:4] in TIFF_STARTS


def is_bmp(data: bytes) -> bool:
    return data.startswith(BMP_START)


def is_whole_jpeg(data: bytes) -> bool:
    """Check the markers at both ends. Other bytes may follow the end, which `image_size` finds."""
    return data.startswith(JPEG_START) and data.endswith(JPEG_END)


def _whole_jpeg_size(data: bytes) -> tuple[int, int]:
    # The end marker is checked too: libjpeg fills the missing part of a truncated file with grey
    # and reports success.
    frame = _jpeg_frame(data)
    if data.rfind(JPEG_END, frame) < 0:
        raise ImageError("truncated JPEG")
    return _jpeg_size(data, frame)


def _jpeg_size(data: bytes, frame: int) -> tuple[int, int]:
    return int.from_bytes(data[frame + 5 : frame + 7]), int.from_bytes(data[frame + 7 : frame + 9])


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


def _whole_png_size(data: bytes) -> tuple[int, int]:
    if data.rfind(PNG_END) < PNG_HEADER:
        raise ImageError("truncated PNG")
    return _png_size(data)


def _png_size(data: bytes) -> tuple[int, int]:
    return int.from_bytes(data[20:24]), int.from_bytes(data[16:20])


def png_depth(data: bytes) -> tuple[int, int]:
    """Return bits per channel and colour type of a PNG file."""
    return data[24], data[25]


def _webp_size(data: bytes) -> tuple[int, int]:
    if len(data) < max(WEBP_HEADER, int.from_bytes(data[4:8], "little") + 8):
        raise ImageError("truncated WebP")
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return height, width


def _tiff_size(data: bytes) -> tuple[int, int]:
    tags = tiff_tags(data)
    return tags.get(TAG_HEIGHT, 0), tags.get(TAG_WIDTH, 0)


def _bmp_size(data: bytes) -> tuple[int, int]:
    if len(data) < BMP_HEADER:
        raise ImageError("truncated BMP")
    if int.from_bytes(data[14:18], "little") == 12:  # the header of OS/2
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return abs(height), abs(width)  # a negative height: rows from the top


SIZES: tuple[tuple[Callable[[bytes], bool], Callable[[bytes], tuple[int, int]]], ...] = (
    (is_jpeg, _whole_jpeg_size),
    (is_png, _whole_png_size),
    (is_webp, _webp_size),
    (is_tiff, _tiff_size),
    (is_bmp, _bmp_size),
)
"""How each format is recognised, and how its size is read."""


def tiff_tags(data: bytes) -> dict[int, int]:
    """Return the first number of each tag in a TIFF file's first directory. Raise ImageError."""
    tags = {}
    try:
        order = TIFF_STARTS[data[:4]]
        (at,) = struct.unpack_from(f"{order}I", data, 4)
        (number,) = struct.unpack_from(f"{order}H", data, at)
        for entry in range(at + 2, at + 2 + 12 * min(number, MAX_TAGS), 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", data, entry)
            if kind not in TAG_TYPES:
                continue
            size = struct.calcsize(TAG_TYPES[kind])
            # Values of more than four bytes are stored elsewhere.
            place = entry + 8
            if count * size > 4:
                (place,) = struct.unpack_from(f"{order}I", data, place)
            (tags[tag],) = struct.unpack_from(f"{order}{TAG_TYPES[kind]}", data, place)
    except (struct.error, KeyError):
        raise ImageError("truncated TIFF") from None
    return tags


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of the chunks of a PNG or WebP file."""
    if is_png(data):
        at = len(PNG_START)
        while at + 12 <= len(data):
            size = int.from_bytes(data[at : at + 4])
            yield data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
            at += 12 + size  # four bytes of checksum
        return
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        yield data[at : at + 4], data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def orientation(data: bytes) -> int:
    """Return the EXIF orientation of a PNG or WebP file, 1 (as stored) without a readable one."""
    for name, content in chunks(data):
        if name in (b"eXIf", b"EXIF"):
            try:
                return tiff_tags(content.removeprefix(b"Exif\0\0")).get(TAG_ORIENTATION, 1)
            except ImageError:
                return 1
    return 1
