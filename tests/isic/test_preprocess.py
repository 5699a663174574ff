"""Decoding and resizing."""

import contextlib
import io
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from isic import images as images_module
from isic.headers import ImageError
from isic.images import Hdf5Images
from isic.preprocess import Pixels, PreprocessSpec, decode, resize
from tests.support.image_files import SPEC


def encode(image: PIL.Image.Image, kind: str, **settings: Any) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, kind, **settings)
    return encoded.getvalue()


def drawn() -> Pixels:
    """A smooth image, uint8 [60, 50, 3] RGB, that JPEG keeps within a few steps."""
    y, x = np.mgrid[0:60, 0:50]
    return np.stack([x * 4, y * 3, 200 - x - y], axis=2).astype(np.uint8)


def claims_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header claims to be `width` x `height`."""
    data = bytearray(encode(PIL.Image.fromarray(drawn()), "JPEG"))
    at = data.find(b"\xff\xc0") + 5
    data[at : at + 4] = height.to_bytes(2) + width.to_bytes(2)
    return bytes(data)


def claims_png(width: int, height: int) -> bytes:
    data = bytearray(png(drawn()))
    data[16:24] = width.to_bytes(4) + height.to_bytes(4)
    return bytes(data)


def png(image: NDArray[Any]) -> bytes:
    """A PNG of RGB or RGBA, of as many bits as the array has."""
    return bytes(cv2.imencode(".png", image[..., [2, 1, 0, *range(3, image.shape[2])]])[1])


IMAGE = PIL.Image.fromarray(drawn())


OF_ALL_KINDS = {
    "grey": (
        encode(IMAGE.convert("L"), "JPEG", quality=95),
        np.asarray(IMAGE.convert("L").convert("RGB")),
    ),
    "CMYK": (encode(IMAGE.convert("CMYK"), "JPEG", quality=95), drawn()),
    "progressive": (encode(IMAGE, "JPEG", quality=95, progressive=True), drawn()),
    "thumbnail": (
        encode(
            IMAGE, "JPEG", quality=95, comment=b"\xff\xd8\xff\xc0 a comment like a header\xff\xd9"
        ),
        drawn(),
    ),
    "16 bit": (png(drawn().astype(np.uint16) * 257), drawn()),
    "palette": (encode(IMAGE.quantize(256), "PNG"), np.asarray(IMAGE.quantize(256).convert("RGB"))),
    "one bit": (encode(IMAGE.convert("1"), "PNG"), np.asarray(IMAGE.convert("1").convert("RGB"))),
}


@pytest.mark.parametrize("kind", OF_ALL_KINDS)
def test_whatever_its_channels_an_image_becomes_rgb(kind: str) -> None:
    data, expected = OF_ALL_KINDS[kind]
    image = decode(data)
    assert image.shape == (60, 50, 3)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - expected).max() <= 12


WHOLE_JPEG = encode(IMAGE, "JPEG")
WHOLE_PNG = png(drawn())
BAD = {
    "empty": (b"", "zero bytes"),
    "text": (b"hello, this is no image", "not an image"),
    "another format": (encode(IMAGE, "GIF"), "not an image"),
    "a JPEG's first bytes": (WHOLE_JPEG[:2], "truncated JPEG"),
    "a JPEG's header": (WHOLE_JPEG[:100], "truncated JPEG"),
    "half a JPEG": (WHOLE_JPEG[: len(WHOLE_JPEG) // 2], "truncated JPEG"),
    "a JPEG but for its end": (WHOLE_JPEG[:-2], "truncated JPEG"),
    "a thumbnail's end is not the image's": (
        b"\xff\xd8\xff\xe1\x00\x06\xff\xd9ab" + WHOLE_JPEG[2:-2],
        "truncated JPEG",
    ),
    "a PNG's header": (WHOLE_PNG[:30], "truncated PNG"),
    "half a PNG": (WHOLE_PNG[: len(WHOLE_PNG) // 2], "truncated PNG"),
    "no pixels": (claims_jpeg(0, 0), "does not decode"),
    "huge JPEG": (claims_jpeg(65_500, 65_500), "claims 65500 x 65500 pixels, more than 33,554,432"),
    "huge PNG": (claims_png(2**31 - 1, 2**31 - 1), "claims 2147483647 x 2147483647 pixels"),
    "rather large": (claims_jpeg(8192, 4097), "claims 8192 x 4097 pixels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_has_a_reason(kind: str) -> None:
    data, reason = BAD[kind]
    with pytest.raises(ImageError, match=reason):
        decode(data)


def test_a_size_from_the_index_changes_no_pixel_and_no_reason(tmp_path: Path) -> None:
    files = {name: data for name, (data, _) in (OF_ALL_KINDS | BAD).items()}
    files["bytes after the end"] = WHOLE_JPEG + b"\0and more"
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name, data in files.items():
            file[name] = np.frombuffer(data, np.uint8)
    store = Hdf5Images(tmp_path / "a.hdf5")
    pixels, failed = store.load(list(files), SPEC)
    assert len(failed) == len(BAD)
    for row, data in enumerate(files.values()):
        try:
            assert (pixels[row] == resize(decode(data), SPEC)).all()
        except ImageError as error:
            assert failed[row] == str(error)


@pytest.mark.parametrize("seed", range(8))
def test_random_damage_is_an_image_or_a_reason(seed: int) -> None:
    """No damage may end a run: bytes changed, removed and put in, half of them in the header."""
    random = np.random.default_rng(seed)
    for data in (WHOLE_JPEG, WHOLE_PNG):
        for _ in range(50):
            damaged = bytearray(data)
            for at in random.integers(0, random.choice([200, len(data)]), 4):
                damaged[at] = random.integers(256)
            cut = int(random.integers(2, len(data)))
            with contextlib.suppress(ImageError):
                assert (
                    decode(bytes(damaged[:cut] + damaged[cut + int(random.integers(3)) :])).shape[2]
                    == 3
                )


def test_golden_image_pins_the_preprocessing() -> None:
    """Decode and resize of a fixed image; a change alters the input of every trained model."""
    y, x = np.mgrid[0:50, 0:50].astype(np.float32)
    drawn = np.stack([x * 5, y * 5, 255 - x * 2.5 - y * 2.5], axis=2).astype(np.uint8)
    png = cv2.imencode(".png", drawn[..., ::-1])[
        1
    ].tobytes()  # lossless, so that no JPEG library has a say
    out = np.empty((1, 8, 8, 3), np.uint8)
    images_module.decode_into(png, PreprocessSpec(size=8), out[0])
    expected = [[13, 13, 241], [44, 13, 226], [76, 13, 210], [107, 13, 195]]
    assert np.abs(out[0, 0, :4].astype(int) - expected).max() <= 1
