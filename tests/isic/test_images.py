import os
import shutil
from pathlib import Path

import cv2
import h5py
import numpy as np
import polars as pl
import pytest
from conftest import jpeg, write_hdf5

from isic import images as images_module
from isic.dataset import Dataset
from isic.errors import UserError
from isic.images import NO_OFFSET, FolderImages, Hdf5Images, build_index, decode_pool, index_path, open_images
from isic.preprocess import ImageError, PreprocessSpec, decode

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
        file.create_dataset("variable", data=np.void(b"x"))  # replaced below by a pointer to the bytes
        del file["variable"]
        kind = h5py.vlen_dtype(np.uint8)
        file.create_dataset("variable", (1,), dtype=kind)[0] = raw
        file.create_dataset("plain", data=np.bytes_(raw.tobytes()))
    index = dict(build_index(path).select("isic_id", "offset").iter_rows())
    assert index["chunked"] == index["variable"] == NO_OFFSET
    assert index["plain"] > 0
    store = Hdf5Images(path)
    assert store.read(["chunked", "plain", "variable"]) == [FILES["ISIC_0000001"]] * 3


def test_the_index_is_cached_and_a_changed_file_noticed(hdf5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    index_path(hdf5).write_bytes(b"PAR1 not a table")
    assert len(Hdf5Images(hdf5)) == 9


def test_a_read_only_folder_keeps_its_index_in_the_cache(hdf5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("num_threads", [None, 1, 2, 5])
def test_decoding_is_the_same_with_any_number_of_threads(hdf5: Path, num_threads: int | None) -> None:
    ids = [*FILES, "absent", *reversed(FILES)]
    out = np.full((len(ids), 32, 32, 3), 77, np.uint8)
    with decode_pool(num_threads or 1) as pool:
        failed = Hdf5Images(hdf5).decode(ids, SPEC, out, pool if num_threads else None)
    assert failed == {9: "no image for this id"}
    assert not out[9].any()
    for row in (0, 8, 10):
        expected = cv2.cvtColor(cv2.imdecode(np.frombuffer(FILES[ids[row]], np.uint8), 1), cv2.COLOR_BGR2RGB)
        assert (out[row] == cv2.resize(expected, (32, 32))).all()


def bad_files() -> dict[str, bytes]:
    grey = cv2.imencode(".jpg", np.zeros((40, 40), np.uint8))[1].tobytes()
    return {
        "zero bytes": b"",
        "truncated JPEG": jpeg(60)[:900],
        "not an image": b"hello, this is no image",
        "": grey,
    }


@pytest.mark.parametrize(("reason", "data"), bad_files().items())
def test_a_bad_image_has_a_reason_and_a_grey_one_is_fine(reason: str, data: bytes) -> None:
    if reason:
        with pytest.raises(ImageError, match=reason):
            decode(data)
    else:
        assert decode(data).shape == (40, 40, 3)


def test_golden_image_pins_the_preprocessing() -> None:
    """Decode and resize of a fixed image; a change here changes what every trained model sees."""
    y, x = np.mgrid[0:50, 0:50].astype(np.float32)
    drawn = np.stack([x * 5, y * 5, 255 - x * 2.5 - y * 2.5], axis=2).astype(np.uint8)
    png = cv2.imencode(".png", drawn[..., ::-1])[1].tobytes()  # lossless, so that no JPEG library has a say
    out = np.empty((1, 8, 8, 3), np.uint8)
    images_module.decode_into(png, PreprocessSpec(size=8), out[0])
    expected = [[13, 13, 241], [44, 13, 226], [76, 13, 210], [107, 13, 195]]
    assert np.abs(out[0, 0, :4].astype(int) - expected).max() <= 1


def test_real_images(real_data: Path, tmp_path: Path) -> None:
    for folder, count in (("real-pairs", 320), ("real-crops", 8166)):
        shutil.copy(real_data / folder / "train-image.hdf5", tmp_path / "train-image.hdf5")
        index = build_index(tmp_path / "train-image.hdf5")
        assert len(index) == count and (index["offset"] > 0).all()
        store = Hdf5Images(tmp_path / "train-image.hdf5")
        with h5py.File(tmp_path / "train-image.hdf5") as file:
            for name in store.ids[:: count // 50]:
                assert store.read([name]) == [file[name][()]]
        index_path(tmp_path / "train-image.hdf5").unlink()
    ids = Dataset(real_data / "real-pairs").metadata("train")["isic_id"].to_list()
    out = np.empty((len(ids), 32, 32, 3), np.uint8)
    assert Dataset(real_data / "real-pairs").images("train").decode(ids, SPEC, out) == {}
    assert pl.Series(out.reshape(len(ids), -1).std(axis=1)).min() > 0
