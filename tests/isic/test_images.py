"""Reading images by id from a file or a folder."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import h5py
import numpy as np
import polars as pl
import pytest

from isic import images as images_module
from isic.dataset import Dataset
from isic.hdf5 import build_index
from isic.images import FolderImages, Hdf5Images, decode_pool, open_images
from isic.runtime.errors import UserError
from tests.support.datasets import jpeg, write_hdf5
from tests.support.image_files import FILES, SPEC, as_nobody, write_files


def test_bytes_by_offset_are_the_files(hdf5: Path) -> None:
    store = Hdf5Images(hdf5)
    assert (build_index(hdf5).offsets > 0).all()
    wanted = ["ISIC_0000007", "ISIC_0000000", "ISIC_0000007"]
    assert store.read(wanted) == [FILES[name] for name in wanted]


def test_a_folder_of_jpegs_reads_alike(tmp_path: Path, hdf5: Path) -> None:
    folder = tmp_path / "other" / "train-image" / "image"
    folder.mkdir(parents=True)
    for name, data in FILES.items():
        (folder / f"{name}.jpg").write_bytes(data)
    store = open_images(tmp_path / "other", "train")
    assert isinstance(store, FolderImages)
    assert store.read(list(FILES)) == list(FILES.values()) == Hdf5Images(hdf5).read(list(FILES))
    assert open_images(tmp_path, "test") is None


def test_a_suffix_may_be_in_any_case_and_the_content_decides(tmp_path: Path) -> None:
    write_files(tmp_path, "A.jpg", "B.JPG", "deep/er/C.Jpeg", "D.png", "E.v2.PNG", "F.gif", "G.txt")
    store = FolderImages(tmp_path)
    assert store.ids.tolist() == ["A", "B", "C", "D", "E.v2"]
    assert store.decode(store.ids.tolist(), SPEC, np.empty((5, 32, 32, 3), np.uint8)) == {}
    assert store.other_files == {".gif": 1, ".txt": 1}


@pytest.mark.parametrize("second", ["A.png", "A.JPG", "128px/A.jpg", "b/A.jpeg"])
def test_two_images_of_one_id_are_refused(tmp_path: Path, second: str) -> None:
    write_files(tmp_path, "A.jpg", "B.jpg", second)
    with pytest.raises(
        UserError, match="1 images have the id of another one, the first are"
    ) as caught:
        FolderImages(tmp_path)
    assert str(tmp_path / "A.jpg") in str(caught.value)
    assert str(tmp_path / second) in str(caught.value)


def test_files_of_operating_systems_are_ignored(tmp_path: Path) -> None:
    write_files(tmp_path, "A.jpg", "._A.jpg", "__MACOSX/A.jpg", ".thumbs/A.jpg", "Thumbs.db")
    write_files(tmp_path, ".ipynb_checkpoints/A.jpg", "@eaDir/A.jpg/A.jpg")
    store = FolderImages(tmp_path)
    assert store.ids.tolist() == ["A"]
    assert not store.other_files
    assert not store.rejected


def test_links_are_followed_and_dead_ones_have_a_reason(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "train-image"
    write_files(folder, "A.jpg", "deep/B.jpg")
    write_files(tmp_path / "disk", "C.jpg")
    write_files(tmp_path / "data" / "test-image", "T.jpg")
    (folder / "more").symlink_to(tmp_path / "disk")
    (folder / "D.jpg").symlink_to(tmp_path / "disk" / "C.jpg")
    (folder / "dead.jpg").symlink_to("/gone/dead.jpg")
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    (folder / "dead").symlink_to("/gone")
    (folder / "self").symlink_to(folder / "self")
    for place in (folder / "deep" / "up", folder / "deep" / "upper"):
        place.symlink_to(folder if place.name == "up" else tmp_path / "data")
    os.mkfifo(folder / "pipe.jpg")
    store = FolderImages(folder)
    assert store.ids.tolist() == ["A", "B", "C", "D"]
    assert store.rejected == {
        "dead": "a link to /gone/dead.jpg, which does not exist",
        "pipe": "not a regular file",
        "self": "cannot be read: Too many levels of symbolic links",
    }
    failed = store.decode(["A", "dead"], SPEC, np.empty((2, 32, 32, 3), np.uint8))
    assert failed == {1: store.rejected["dead"]}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_folder_without_permission_is_refused(shared_folder: Path) -> None:
    write_files(shared_folder, "A.jpg", "deep/B.jpg")
    (shared_folder / "deep").chmod(0o700)
    words = as_nobody(lambda: FolderImages(shared_folder))
    assert words == f"UserError: {shared_folder / 'deep'} cannot be read: Permission denied"
    write_hdf5(shared_folder / "train-image.hdf5", FILES)
    (shared_folder / "train-image.hdf5").chmod(0o600)
    words = as_nobody(lambda: open_images(shared_folder, "train"))
    assert words.endswith("train-image.hdf5 cannot be read: Permission denied")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "A.gif", "B.gif", "notes.txt")
    with pytest.raises(UserError, match=r"holds no images .*it has other files: 2 \.gif, 1 \.txt"):
        FolderImages(tmp_path)
    with pytest.raises(UserError, match=r"A\.gif cannot be read: Not a directory"):
        FolderImages(tmp_path / "A.gif")


def test_a_name_that_is_not_utf8_is_no_ones_image(tmp_path: Path) -> None:
    write_files(tmp_path, "L\u00e4.jpg", "z.jpg", os.fsdecode(b"L\xe4.jpg"))
    store = FolderImages(tmp_path)
    assert store.missing(["L\u00e4", "z", "L\udce4", "L\\xe4"]) == ["L\udce4", "L\\xe4"]
    assert sorted(store.ids) == ["L\\xe4", "L\u00e4", "z"]


@pytest.mark.parametrize("wanted", ["A\0", "A\0B", "AB", "A" * 1_000_000, "", "a", " A", "A "])
def test_only_the_same_id_is_found(tmp_path: Path, wanted: str) -> None:
    write_hdf5(tmp_path / "a.hdf5", {"A": jpeg(20), "B": jpeg(21)})
    assert Hdf5Images(tmp_path / "a.hdf5").missing(["A", wanted, "B"]) == [wanted]


def test_an_id_without_an_image_is_named(hdf5: Path) -> None:
    store = Hdf5Images(hdf5)
    assert store.missing(["ISIC_0000001", "ISIC_9", "A"]) == ["ISIC_9", "A"]
    with pytest.raises(UserError, match="1 of 2 images cannot be read, the first is ISIC_9"):
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
    assert out[1].any()
    assert not out[0].any()


def test_neighbours_are_read_with_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 images in any order: one read for all neighbours, none if they are too large."""
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
    assert len(store.read_ahead([0, 1, 5, 30])) == 4
    assert len(calls) > 2
    monkeypatch.setattr(images_module, "MAX_AHEAD", 1000)
    assert store.read_ahead(positions) == {}


@pytest.mark.parametrize("how", ["truncated", "overwritten", "written to", "replaced"])
def test_a_file_that_changes_while_it_is_used_is_refused(hdf5: Path, how: str) -> None:
    store, before = Hdf5Images(hdf5), hdf5.stat()
    if how == "truncated":
        os.truncate(hdf5, int(store._offsets[4]) + 50)
    elif how == "overwritten":
        hdf5.write_bytes(hdf5.read_bytes())
        os.utime(hdf5, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif how == "replaced":
        write_hdf5(hdf5.with_name("new"), {"ISIC_0000000": jpeg(20)})
        hdf5.with_name("new").replace(hdf5)
    else:
        with h5py.File(hdf5, "a") as file:
            del file["ISIC_0000003"]
    out = np.empty((9, 32, 32, 3), np.uint8)
    for use in (lambda: store.decode(list(FILES), SPEC, out), lambda: store.read(list(FILES))):
        with pytest.raises(UserError, match="was changed on disk while it was in use"):
            use()


READ_PICKLED = """
import pickle, sys
from isic.runtime.errors import UserError
try:
    store = pickle.load(sys.stdin.buffer)
except UserError as error:
    sys.exit(f"UserError: {error}")
sys.stdout.buffer.write(b"".join(store.read(sys.argv[1:])))
"""


def read_in_another_process(
    pickled: bytes, ids: Sequence[str]
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", READ_PICKLED, *ids]
    return subprocess.run(command, input=pickled, capture_output=True, check=False)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_another_process_reads_a_pickled_store(tmp_path: Path, hdf5: Path, kind: str) -> None:
    for name, data in FILES.items():
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.jpg").write_bytes(data)
    store = Hdf5Images(hdf5) if kind == "file" else FolderImages(tmp_path / "images")
    wanted = ["ISIC_0000007", "ISIC_0000000"]
    found = read_in_another_process(pickle.dumps(store), wanted)
    assert found.stdout == b"".join(FILES[name] for name in wanted), found.stderr.decode()


@pytest.mark.parametrize("how", ["replaced", "rewritten", "removed", "another format"])
def test_a_pickled_store_of_another_file_is_refused(hdf5: Path, how: str) -> None:
    pickled = pickle.dumps(Hdf5Images(hdf5))
    words = "was changed on disk while it was in use; run the same command again"
    data = hdf5.read_bytes()
    if how == "replaced":
        hdf5.with_name("new").write_bytes(data)  # while the first file has its inode
        hdf5.with_name("new").replace(hdf5)
    elif how == "rewritten":
        hdf5.write_bytes(data)
    elif how == "removed":
        hdf5.unlink()
        words = "No such file or directory"
    else:
        hdf5.write_bytes(b"half a file")
        words = "is not an HDF5 file"
    found = read_in_another_process(pickled, list(FILES))
    assert found.returncode == 1
    assert not found.stdout
    error = found.stderr.decode()
    assert error.startswith(f"UserError: {hdf5}")
    assert words in error


def test_real_images(real_data: Path, tmp_path: Path) -> None:
    for folder, count in (("real-pairs", 320), ("real-crops", 8166)):
        shutil.copy(real_data / folder / "train-image.hdf5", tmp_path / "train-image.hdf5")
        index = build_index(tmp_path / "train-image.hdf5")
        assert len(index.ids) == count
        assert (index.offsets > 0).all()
        store = Hdf5Images(tmp_path / "train-image.hdf5")
        with h5py.File(tmp_path / "train-image.hdf5") as file:
            for name in store.ids[:: count // 50]:
                assert store.read([name]) == [file[name][()]]
    ids = Dataset(real_data / "real-pairs").metadata("train")["isic_id"].to_list()
    out = np.empty((len(ids), 32, 32, 3), np.uint8)
    assert Dataset(real_data / "real-pairs").images("train").decode(ids, SPEC, out) == {}
    assert pl.Series(out.reshape(len(ids), -1).std(axis=1)).min() > 0
