import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import PIL.Image
import polars as pl
import pytest
from conftest import jpeg, write_hdf5
from numpy.typing import NDArray

from isic import images as images_module
from isic.dataset import Dataset
from isic.errors import UserError
from isic.images import (
    NO_OFFSET,
    FolderImages,
    Hdf5Images,
    build_index,
    decode_pool,
    index_path,
    open_images,
)
from isic.preprocess import ImageError, Pixels, PreprocessSpec, decode

SPEC = PreprocessSpec(size=32)
FILES = {f"ISIC_{i:07d}": jpeg(50 + i, seed=i) for i in range(9)}


@pytest.fixture
def hdf5(tmp_path: Path) -> Path:
    write_hdf5(tmp_path / "train-image.hdf5", FILES)
    return tmp_path / "train-image.hdf5"


def test_bytes_by_offset_are_the_files(hdf5: Path) -> None:
    store = Hdf5Images(hdf5)
    assert (build_index(hdf5)["offset"] > 0).all()
    wanted = ["ISIC_0000007", "ISIC_0000000", "ISIC_0000007"]
    assert store.read(wanted) == [FILES[name] for name in wanted]


def test_storage_that_has_no_offset_is_read_through_h5py(tmp_path: Path) -> None:
    path = tmp_path / "odd.hdf5"
    raw = np.frombuffer(FILES["ISIC_0000001"], np.uint8)
    with h5py.File(path, "w") as file:
        file.create_dataset("chunked", data=raw, chunks=(64,), compression="gzip")
        file.create_dataset(
            "variable", data=np.void(b"x")
        )  # replaced below by a pointer to the bytes
        del file["variable"]
        kind = h5py.vlen_dtype(np.uint8)
        file.create_dataset("variable", (1,), dtype=kind)[0] = raw
        file.create_dataset("plain", data=np.bytes_(raw.tobytes()))
    index = build_index(path)
    assert index["isic_id"].tolist() == [b"chunked", b"plain", b"variable"]
    chunked, plain, variable = index["offset"]
    assert chunked == variable == NO_OFFSET
    assert plain > 0
    store = Hdf5Images(path)
    assert store.read(["chunked", "plain", "variable"]) == [FILES["ISIC_0000001"]] * 3


def test_the_index_is_cached_and_a_changed_file_noticed(
    hdf5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hdf5Images(hdf5)
    assert index_path(hdf5).is_file()
    with monkeypatch.context() as patch:
        patch.setattr(images_module, "build_index", lambda path: pytest.fail("built again"))
        assert len(Hdf5Images(hdf5)) == 9
    write_hdf5(hdf5, {"other": jpeg(30)})
    os.utime(hdf5, ns=(1, 1))
    assert Hdf5Images(hdf5).ids.tolist() == ["other"]


def test_a_damaged_index_is_built_again(hdf5: Path) -> None:
    Hdf5Images(hdf5)
    whole = index_path(hdf5).read_bytes()
    for damaged in (
        b"not an archive",
        b"",
        whole[: len(whole) // 2],
        whole.replace(b"size.npy", b"sise.npy"),
    ):
        index_path(hdf5).write_bytes(damaged)
        assert len(Hdf5Images(hdf5)) == 9
        assert index_path(hdf5).read_bytes() == whole


def test_names_of_every_slice_of_a_large_file_are_found(
    hdf5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "INDEX_SLICE", 2)
    store = Hdf5Images(hdf5)
    assert store.ids.tolist() == sorted(FILES)
    assert store.read(list(FILES)) == list(FILES.values())


def test_a_read_only_folder_keeps_its_index_in_the_cache(
    hdf5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = hdf5.parent / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert len(Hdf5Images(hdf5)) == 9
    assert cache in index_path(hdf5).parents and index_path(hdf5).is_file()


def test_a_truncated_file_is_refused(hdf5: Path) -> None:
    whole = hdf5.read_bytes()
    for length in (len(whole) // 2, 100, 0):
        hdf5.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a whole HDF5 file"):
            Hdf5Images(hdf5)


def test_a_folder_of_jpegs_reads_alike(tmp_path: Path, hdf5: Path) -> None:
    folder = tmp_path / "other" / "train-image" / "image"
    folder.mkdir(parents=True)
    for name, data in FILES.items():
        (folder / f"{name}.jpg").write_bytes(data)
    store = open_images(tmp_path / "other", "train")
    assert isinstance(store, FolderImages)
    assert store.read(list(FILES)) == list(FILES.values()) == Hdf5Images(hdf5).read(list(FILES))
    assert open_images(tmp_path, "test") is None


def test_an_id_without_an_image_is_named(hdf5: Path) -> None:
    store = Hdf5Images(hdf5)
    assert store.missing(["ISIC_0000001", "ISIC_9", "A"]) == ["ISIC_9", "A"]
    with pytest.raises(UserError, match="1 of 2 ids have no image, the first is ISIC_9"):
        store.read(["ISIC_0000001", "ISIC_9"])


def test_names_of_any_length_and_script_are_found(tmp_path: Path) -> None:
    files = {
        name: jpeg(20, value)
        for value, name in enumerate(["a", "läsion", "病変", "a longer name than the others"])
    }
    write_hdf5(tmp_path / "train-image.hdf5", files)
    store = Hdf5Images(tmp_path / "train-image.hdf5")
    assert store.ids.tolist() == sorted(files)
    assert store.read(list(files)) == list(files.values())
    assert store.missing(["ä", "a longer name than the others, and not there", "病変"]) == [
        "ä",
        "a longer name than the others, and not there",
    ]


@pytest.mark.parametrize("num_threads", [None, 1, 2, 5])
def test_decoding_is_the_same_with_any_number_of_threads(
    hdf5: Path, num_threads: int | None
) -> None:
    ids = [*FILES, "absent", *reversed(FILES)]
    out = np.full((len(ids), 32, 32, 3), 77, np.uint8)
    with decode_pool(num_threads or 1) as pool:
        failed = Hdf5Images(hdf5).decode(ids, SPEC, out, pool if num_threads else None)
    assert failed == {9: "no image for this id"}
    assert not out[9].any()
    for row in (0, 8, 10):
        expected = cv2.cvtColor(
            cv2.imdecode(np.frombuffer(FILES[ids[row]], np.uint8), 1), cv2.COLOR_BGR2RGB
        )
        assert (out[row] == cv2.resize(expected, (32, 32))).all()


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
    "transparent": (png(np.dstack([drawn(), drawn()[..., 0]])), drawn()),
    "palette": (encode(IMAGE.quantize(256), "PNG"), np.asarray(IMAGE.quantize(256).convert("RGB"))),
    "one bit": (encode(IMAGE.convert("1"), "PNG"), np.asarray(IMAGE.convert("1").convert("RGB"))),
}


@pytest.mark.parametrize("kind", OF_ALL_KINDS)
def test_whatever_its_channels_an_image_becomes_rgb(kind: str) -> None:
    data, expected = OF_ALL_KINDS[kind]
    image = decode(data)
    assert image.shape == (60, 50, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - expected).max() <= 12


WHOLE_JPEG, WHOLE_PNG = encode(IMAGE, "JPEG"), png(drawn())
BAD = {
    "empty": (b"", "zero bytes"),
    "text": (b"hello, this is no image", "not an image"),
    "another format": (encode(IMAGE, "TIFF"), "not an image"),
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


def test_an_image_that_cannot_be_read_is_a_reason(tmp_path: Path) -> None:
    folder = tmp_path / "train-image"
    folder.mkdir()
    for name in ("A", "B", "C"):
        (folder / f"{name}.jpg").write_bytes(jpeg(20))
    store = FolderImages(folder)
    (folder / "A.jpg").unlink()
    (folder / "C.jpg").unlink()
    (folder / "C.jpg").mkdir()
    out = np.empty((3, 32, 32, 3), np.uint8)
    assert store.decode(["A", "B", "C"], SPEC, out) == {
        0: "cannot be read: No such file or directory",
        2: "cannot be read: Is a directory",
    }
    assert out[1].any() and not out[0].any()


def test_neighbours_are_read_with_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 images in any order: one read for all where they lie together, none where they are too much for memory."""
    files = {f"ISIC_{i:07d}": jpeg(40 + i, seed=i) for i in range(32)}
    write_hdf5(tmp_path / "a.hdf5", files)
    store, read, calls = Hdf5Images(tmp_path / "a.hdf5"), os.pread, []

    def counted(*arguments: int) -> bytes:
        calls.append(arguments)
        return read(*arguments)

    monkeypatch.setattr(os, "pread", counted)
    positions = np.random.default_rng(0).permutation(32).tolist()
    assert store.read_ahead([*positions, -1]) == {
        position: list(files.values())[position] for position in positions
    }
    assert len(calls) == 1
    monkeypatch.setattr(images_module, "MAX_GAP", 0)
    assert len(store.read_ahead([0, 1, 5, 30])) == 4 and len(calls) > 2
    monkeypatch.setattr(images_module, "MAX_AHEAD", 1000)
    assert store.read_ahead(positions) == {}


def test_a_file_cut_short_after_it_was_indexed_is_a_reason(hdf5: Path) -> None:
    store = Hdf5Images(hdf5)
    os.truncate(hdf5, int(store._offsets[4]) + 50)
    out = np.empty((9, 32, 32, 3), np.uint8)
    failed = store.decode(list(FILES), SPEC, out)
    assert failed[4] == "truncated JPEG" and set(failed) <= set(range(4, 9))


def test_golden_image_pins_the_preprocessing() -> None:
    """Decode and resize of a fixed image; a change here changes what every trained model sees."""
    y, x = np.mgrid[0:50, 0:50].astype(np.float32)
    drawn = np.stack([x * 5, y * 5, 255 - x * 2.5 - y * 2.5], axis=2).astype(np.uint8)
    png = cv2.imencode(".png", drawn[..., ::-1])[
        1
    ].tobytes()  # lossless, so that no JPEG library has a say
    out = np.empty((1, 8, 8, 3), np.uint8)
    images_module.decode_into(png, PreprocessSpec(size=8), out[0])
    expected = [[13, 13, 241], [44, 13, 226], [76, 13, 210], [107, 13, 195]]
    assert np.abs(out[0, 0, :4].astype(int) - expected).max() <= 1


def test_real_images(real_data: Path, tmp_path: Path) -> None:
    for folder, count in (("real-pairs", 320), ("real-crops", 8166)):
        shutil.copy(real_data / folder / "train-image.hdf5", tmp_path / "train-image.hdf5")
        index = build_index(tmp_path / "train-image.hdf5")
        assert len(index["isic_id"]) == count and (index["offset"] > 0).all()
        store = Hdf5Images(tmp_path / "train-image.hdf5")
        with h5py.File(tmp_path / "train-image.hdf5") as file:
            for name in store.ids[:: count // 50]:
                assert store.read([name]) == [file[name][()]]
        index_path(tmp_path / "train-image.hdf5").unlink()
    ids = Dataset(real_data / "real-pairs").metadata("train")["isic_id"].to_list()
    out = np.empty((len(ids), 32, 32, 3), np.uint8)
    assert Dataset(real_data / "real-pairs").images("train").decode(ids, SPEC, out) == {}
    assert pl.Series(out.reshape(len(ids), -1).std(axis=1)).min() > 0
