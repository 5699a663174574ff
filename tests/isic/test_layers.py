"""Pixels of every kind of image file, against Pillow and by hand."""

import io
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from numpy.typing import NDArray

from isic import preprocess
from isic.headers import IMAGE_SUFFIXES, ImageError, image_size
from isic.images import FolderImages, Hdf5Images
from isic.layers import TURNS, is_plain
from isic.preprocess import Pixels, PreprocessSpec, check_mask, decode, decode_mask, resize
from isic.synth.write import write_images

HEIGHT, WIDTH = 60, 50


def drawn() -> Pixels:
    """A smooth image, uint8 [60, 50, 3] RGB."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([x * 4, y * 3, 200 - x - y], axis=2).astype(np.uint8)


def alpha() -> Pixels:
    """Transparent at the left, opaque at the right; uint8 [60, 50]."""
    return np.broadcast_to(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, WIDTH)).copy()


def over(colours: NDArray[Any], weight: NDArray[Any], background: int) -> NDArray[Any]:
    """The definition of a mixture in floating point."""
    share = weight[..., None] / 255
    return np.rint(colours * share + background * (1 - share))


def encode(image: PIL.Image.Image, kind: str, **settings: Any) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, kind, **settings)
    return encoded.getvalue()


def exif(orientation: int) -> PIL.Image.Exif:
    found = PIL.Image.Exif()
    found[274] = orientation
    return found


def by_opencv(suffix: str, image: NDArray[Any]) -> bytes:
    """A file of RGB or RGBA, of as many bits as the array has."""
    return bytes(cv2.imencode(suffix, image[..., [2, 1, 0, *range(3, image.shape[2])]])[1])


def tiff(image: NDArray[Any], photometric: int, extra: int | None = None, form: int = 1) -> bytes:
    """A TIFF file of one strip without compression."""
    order = ">" if image.dtype.byteorder == ">" else "<"
    channels = image.shape[2] if image.ndim == 3 else 1
    bits = image.dtype.itemsize * 8
    pixels = image.tobytes()
    tags = {256: WIDTH, 257: HEIGHT, 259: 1, 262: photometric, 273: 8, 277: channels, 278: HEIGHT}
    tags |= {279: len(pixels), 339: form} | ({} if extra is None else {338: extra})
    place = 8 + len(pixels)
    after = place + 2 + 12 * (len(tags) + 1) + 4
    entries = {tag: struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items()}
    entries[258] = struct.pack(f"{order}HHI", 258, 3, channels)
    entries[258] += (
        struct.pack(f"{order}I", after)
        if channels > 2
        else bits.to_bytes(2, "big" if order == ">" else "little") * channels
        + bytes(4 - 2 * channels)
    )
    return b"".join(
        [
            b"MM\0*" if order == ">" else b"II*\0",
            struct.pack(f"{order}I", place),
            pixels,
            struct.pack(f"{order}H", len(entries)),
            *(entries[tag] for tag in sorted(entries)),
            bytes(4),
            struct.pack(f"{order}{channels}H", *[bits] * channels),
        ]
    )


IMAGE = PIL.Image.fromarray(drawn())
RGBA = np.dstack([drawn(), alpha()])
GREY = drawn()[..., 0]
SIXTEEN = drawn().astype(np.uint16) * 257 + 100
"""Rounds to the same 8 bits as `drawn`."""
TURNED = [f"{kind} {number}" for kind in ("PNG", "WEBP", "TIFF", "JPEG") for number in TURNS]


def lossless(kind: str) -> dict[str, Any]:
    return {"lossless": True} if kind == "WEBP" else {}


OPAQUE = {
    "PNG": encode(IMAGE, "PNG"),
    "PNG, grey": encode(IMAGE.convert("L"), "PNG"),
    "PNG, one bit": encode(IMAGE.convert("1"), "PNG"),
    "PNG, palette": encode(IMAGE.quantize(256), "PNG"),
    "WebP": encode(IMAGE, "WEBP", lossless=True),
    "WebP, lossy": encode(IMAGE, "WEBP"),
    "WebP, animated": encode(
        IMAGE, "WEBP", lossless=True, save_all=True, append_images=[IMAGE.rotate(90)]
    ),
    "TIFF": encode(IMAGE, "TIFF"),
    "TIFF, grey": encode(IMAGE.convert("L"), "TIFF"),
    "TIFF, white is zero": tiff(GREY, 0),
    "TIFF, one bit": encode(IMAGE.convert("1"), "TIFF"),
    "TIFF, palette": encode(IMAGE.quantize(256), "TIFF"),
    "TIFF, CMYK": encode(IMAGE.convert("CMYK"), "TIFF"),
    "TIFF, LZW": encode(IMAGE, "TIFF", compression="tiff_lzw"),
    "TIFF, deflate": encode(IMAGE, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF, JPEG": encode(IMAGE, "TIFF", compression="jpeg"),
    "TIFF, YCbCr": encode(IMAGE.convert("YCbCr"), "TIFF"),
    "TIFF, two pages": encode(IMAGE, "TIFF", save_all=True, append_images=[IMAGE.rotate(90)]),
    "BMP": encode(IMAGE, "BMP"),
    "BMP, grey": encode(IMAGE.convert("L"), "BMP"),
    "BMP, one bit": encode(IMAGE.convert("1"), "BMP"),
    "BMP, palette": encode(IMAGE.quantize(256), "BMP"),
    "BMP, 32 bits": encode(PIL.Image.fromarray(RGBA), "BMP"),
    "JPEG, CMYK": encode(IMAGE.convert("CMYK"), "JPEG", quality=95),
}
"""Files whose pixels Pillow decodes to the same RGB."""


@pytest.mark.parametrize("kind", OPAQUE)
def test_pixels_are_those_of_another_decoder(kind: str) -> None:
    expected = np.asarray(PIL.Image.open(io.BytesIO(OPAQUE[kind])).convert("RGB"))
    found = decode(OPAQUE[kind])
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert image_size(OPAQUE[kind]) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", TURNED)
def test_every_exif_turn_is_applied(kind: str) -> None:
    name, number = kind.split()
    data = encode(IMAGE, name, exif=exif(int(number)), **lossless(name))
    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(decode(data), np.asarray(expected))


def test_a_transparent_image_is_turned_too() -> None:
    data = encode(PIL.Image.fromarray(RGBA), "PNG", exif=exif(6))
    expected = np.rot90(over(drawn(), alpha(), 255), -1)
    assert np.abs(decode(data).astype(int) - expected).max() <= 1


GREY_ALPHA = np.dstack([GREY, GREY, GREY])
PREMULTIPLIED = np.dstack([np.rint(drawn() * (alpha()[..., None] / 255)), alpha()])
KEYED = np.where(GREY[30, 20] == GREY, 0, 255)
TRANSPARENT: dict[str, tuple[bytes, NDArray[Any], NDArray[Any]]] = {
    "PNG": (encode(PIL.Image.fromarray(RGBA), "PNG"), drawn(), alpha()),
    "PNG, grey": (encode(PIL.Image.fromarray(RGBA[..., [0, 3]], "LA"), "PNG"), GREY_ALPHA, alpha()),
    "PNG, 16 bit": (by_opencv(".png", RGBA.astype(np.uint16) * 257), drawn(), alpha()),
    "PNG, one grey": (
        encode(PIL.Image.fromarray(GREY), "PNG", transparency=int(GREY[30, 20])),
        GREY_ALPHA,
        KEYED,
    ),
    "WebP": (
        encode(PIL.Image.fromarray(RGBA), "WEBP", lossless=True, exact=True),
        drawn(),
        alpha(),
    ),
    "TIFF": (encode(PIL.Image.fromarray(RGBA), "TIFF"), drawn(), alpha()),
    "TIFF, premultiplied": (tiff(PREMULTIPLIED.astype(np.uint8), 2, extra=1), drawn(), alpha()),
    "TIFF, 16 bit": (tiff(RGBA.astype(np.uint16) * 257, 2, extra=2), drawn(), alpha()),
    "TIFF, 16 bit premultiplied": (
        tiff(PREMULTIPLIED.astype(np.uint16) * 257, 2, extra=1),
        drawn(),
        alpha(),
    ),
}
"""File, colours, and alpha."""


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_a_transparent_image_lies_on_white_and_a_mask_on_black(kind: str) -> None:
    data, colours, weight = TRANSPARENT[kind]
    assert np.abs(decode(data) - over(colours, weight, 255)).max() <= 1
    assert np.abs(decode_mask(data) - over(colours, weight, 0)).max() <= 1


@pytest.mark.parametrize("table", [bytes(range(0, 256, 16)), 3])
def test_transparent_colours_of_a_palette_are_white(table: bytes | int) -> None:
    data = encode(IMAGE.quantize(16), "PNG", transparency=table)
    found = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGBA"))
    expected = over(found[..., :3], found[..., 3], 255)
    assert np.abs(decode(data) - expected).max() <= 1


def test_a_mask_that_is_transparent_outside_of_the_lesion_can_be_used() -> None:
    lesion = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    lesion[20:40, 20:30] = 255
    mask = encode(PIL.Image.fromarray(lesion), "PNG")
    assert check_mask(mask, OPAQUE["PNG"]) is None
    assert np.array_equal(decode_mask(mask)[..., 0], lesion[..., 3])


IN_16_BITS = {
    "PNG": by_opencv(".png", SIXTEEN),
    "TIFF": by_opencv(".tiff", SIXTEEN),
    "TIFF, big-endian": tiff(SIXTEEN.astype(">u2"), 2),
}


@pytest.mark.parametrize("kind", IN_16_BITS)
def test_16_bits_are_divided_by_257_and_rounded(kind: str) -> None:
    assert np.array_equal(decode(IN_16_BITS[kind]), drawn())


@pytest.mark.parametrize(("photometric", "inverted"), [(0, True), (1, False)])
def test_grey_of_16_bits_in_a_tiff(photometric: int, inverted: bool) -> None:
    grey = decode(tiff(GREY.astype(np.uint16) * 257, photometric))[..., 0]
    assert np.array_equal(grey, 255 - GREY if inverted else GREY)


def test_a_channel_that_is_not_named_alpha_is_left_out() -> None:
    for data in (tiff(RGBA, 2, extra=0), tiff(RGBA.astype(np.uint16) * 257, 2, extra=0)):
        assert np.array_equal(decode(data), drawn())


REFUSED = {
    "fractions": (encode(PIL.Image.fromarray(GREY / np.float32(255)), "TIFF"), "other numbers"),
    "32 bits": (tiff(GREY.astype(np.uint32), 1), "other numbers than 8 or 16 bits"),
    "signed": (tiff(GREY.astype(np.int16), 1, form=2), "without sign"),
    "Lab": (tiff(drawn(), 8), "of other colours than grey, RGB"),
    "grey with alpha": (encode(PIL.Image.fromarray(RGBA[..., [0, 3]], "LA"), "TIFF"), "a grey"),
    "five channels": (tiff(np.dstack([RGBA, GREY]), 2, extra=0), "does not decode"),
    "no directory": (b"II*\0" + (10_000).to_bytes(4, "little"), "truncated TIFF"),
    "half a TIFF": (OPAQUE["TIFF"][:5000], "does not decode|truncated TIFF"),
    "half a TIFF without its directory": (tiff(drawn(), 2)[:5000], "truncated TIFF"),
    "half a WebP": (OPAQUE["WebP"][:40], "truncated WebP"),
    "half a BMP": (OPAQUE["BMP"][:5000], "does not decode"),
    "a BMP's first bytes": (OPAQUE["BMP"][:20], "truncated BMP"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_image_without_defined_pixels_is_refused(kind: str) -> None:
    data, reason = REFUSED[kind]
    with pytest.raises(ImageError, match=reason):
        decode(data)


def test_sizes_that_would_fill_the_memory_are_refused_before_decoding() -> None:
    bmp = bytearray(OPAQUE["BMP"])
    bmp[18:26] = struct.pack("<ii", 60_000, -60_000)
    webp = bytearray(encode(IMAGE, "WEBP", lossless=True, exif=exif(1)))
    webp[24:30] = b"\xff" * 6
    for data in (bmp, webp):
        with pytest.raises(ImageError, match=r"claims \d+ x \d+ pixels"):
            decode(bytes(data))


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_is_an_image_or_a_reason(seed: int) -> None:
    random = np.random.default_rng(seed)
    files = [OPAQUE["WebP"], OPAQUE["TIFF, LZW"], OPAQUE["BMP"], TRANSPARENT["PNG"][0]]
    for data in [*files, encode(IMAGE, "PNG", exif=exif(6)), OPAQUE["TIFF, palette"]]:
        for _ in range(30):
            damaged = bytearray(data)
            for at in random.integers(0, min(len(data), random.choice([60, 20_000])), 4):
                damaged[at] = random.integers(256)
            try:
                assert decode(bytes(damaged)).shape[2] == 3
            except ImageError as error:
                assert str(error)


JPEGS = {
    "RGB": encode(IMAGE, "JPEG"),
    "grey": encode(IMAGE.convert("L"), "JPEG"),
    "CMYK": encode(IMAGE.convert("CMYK"), "JPEG"),
    "progressive": encode(IMAGE, "JPEG", progressive=True),
    "turned": encode(IMAGE, "JPEG", exif=exif(8)),
    "4:2:0 of an odd size": encode(IMAGE.resize((51, 33)), "JPEG", subsampling=2, quality=50),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_keeps_the_pixels_of_a_plain_call_of_opencv(kind: str) -> None:
    """Models were trained on these pixels."""
    expected = cv2.imdecode(np.frombuffer(JPEGS[kind], np.uint8), cv2.IMREAD_COLOR_RGB)
    assert is_plain(JPEGS[kind])
    assert np.array_equal(decode(JPEGS[kind]), expected)


def test_the_header_alone_decides_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "decode_layers", lambda *_: pytest.fail("the slow path"))
    for kind in ("PNG", "PNG, grey", "PNG, palette", "BMP"):
        decode(OPAQUE[kind])


def test_a_folder_may_hold_every_ending_in_any_case(tmp_path: Path) -> None:
    kinds = ("JPEG", "JPEG", "PNG", "WEBP", "TIFF", "TIFF", "BMP")
    for number, (suffix, kind) in enumerate(zip(IMAGE_SUFFIXES, kinds, strict=True)):
        name = suffix.upper() if number % 2 else suffix
        (tmp_path / f"a{number}{name}").write_bytes(encode(IMAGE, kind, **lossless(kind)))
    store = FolderImages(tmp_path)
    assert len(store) == len(IMAGE_SUFFIXES)
    spec = PreprocessSpec(size=32)
    pixels, failed = store.load(list(store.ids), spec)
    assert not failed
    assert np.abs(pixels.astype(int) - resize(drawn(), spec)).max() <= 8


def test_every_kind_is_read_from_an_hdf5_file_too(tmp_path: Path) -> None:
    """Formats other than JPEG may end in zero bytes, which belong to the file."""
    files = {f"{number:02}": data for number, data in enumerate(OPAQUE.values())}
    files |= {f"9{number}": data for number, (data, *_) in enumerate(TRANSPARENT.values())}
    files["zeros"] = OPAQUE["BMP"][:-300] + bytes(300)
    write_images(tmp_path / "a.hdf5", sorted(files.items()))
    store = Hdf5Images(tmp_path / "a.hdf5")
    assert store.read(list(files)) == list(files.values())
    spec = PreprocessSpec(size=32)
    pixels, failed = store.load(list(files), spec)
    assert not failed
    for row, data in enumerate(files.values()):
        assert np.array_equal(pixels[row], resize(decode(data), spec))
