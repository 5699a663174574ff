"""HDF5 files of images: byte ranges, storage layouts, and reasons of unusable ones."""

import contextlib
import gzip
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest

from isic import hdf5 as hdf5_module
from isic import preprocess
from isic.hdf5 import HEADER_BYTES, NO_OFFSET, build_index
from isic.images import Hdf5Images, open_images
from isic.runtime.errors import UserError
from tests.support.datasets import jpeg
from tests.support.image_files import FILES, SPEC


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
    assert index.ids.tolist() == [b"chunked", b"plain", b"variable"]
    chunked, plain, variable = index.offsets
    assert chunked == variable == NO_OFFSET
    assert plain > 0
    store = Hdf5Images(path)
    assert store.read(["chunked", "plain", "variable"]) == [FILES["ISIC_0000001"]] * 3


def test_the_index_has_the_size_in_the_header(tmp_path: Path) -> None:
    image = np.zeros((30, 20, 3), np.uint8)
    plain, png = (bytes(cv2.imencode(suffix, image)[1]) for suffix in (".jpg", ".png"))
    profile = b"\xff\xe2" + (HEADER_BYTES + 2).to_bytes(2) + bytes(HEADER_BYTES)
    cut = plain[: plain.find(b"\xff\xc0") + 4]  # other images follow it in the file
    huge = plain.replace((30).to_bytes(2) + (20).to_bytes(2), b"\xff\xff\xff\xff", 1)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["a cut"] = np.frombuffer(cut, np.uint8)
        file["b plain"] = np.frombuffer(plain, np.uint8)
        file["c PNG"] = np.frombuffer(png, np.uint8)
        file["d profile"] = np.frombuffer(plain[:2] + profile + plain[2:], np.uint8)
        file["e huge"] = np.frombuffer(huge, np.uint8)
        file["f short PNG"] = np.frombuffer(png[:20], np.uint8)
        file.create_dataset("g chunked", data=np.frombuffer(plain, np.uint8), chunks=(64,))
    index = build_index(tmp_path / "a.hdf5")
    assert index.heights.tolist() == [0, 30, 30, 30, 65535, 0, 0]
    assert index.widths.tolist() == [0, 20, 20, 20, 65535, 0, 0]


def test_an_image_that_claims_any_size_takes_little_memory(tmp_path: Path) -> None:
    """As in a damaged file: a JPEG without a frame header, of 4 EiB."""
    (tmp_path / "a").write_bytes(b"\xff\xd8" + bytes(2 * HEADER_BYTES))
    with open(tmp_path / "a", "rb") as file:
        offsets, sizes = np.array([0]), np.array([1 << 62])
        heights, widths, without = hdf5_module._read_headers(file.fileno(), offsets, sizes)
    assert (heights.tolist(), widths.tolist(), without) == ([0], [0], [])


def test_a_header_is_not_read_again(hdf5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Hdf5Images(hdf5)
    monkeypatch.setattr(preprocess, "image_size", lambda data: pytest.fail("read again"))
    assert store.load(list(FILES), SPEC)[1] == {}


def test_names_of_every_slice_of_a_large_file_are_found(
    hdf5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5_module, "INDEX_SLICE", 2)
    store = Hdf5Images(hdf5)
    assert store.ids.tolist() == sorted(FILES)
    assert store.read(list(FILES)) == list(FILES.values())


def test_a_truncated_file_is_refused(hdf5: Path) -> None:
    whole = hdf5.read_bytes()
    for length in (len(whole) // 2, 100, 0):
        hdf5.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a whole HDF5 file"):
            Hdf5Images(hdf5)


OTHER_FILES = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a zip archive": b"PK\x03\x04 and so on",
    "compressed with gzip": gzip.compress(b"an HDF5 file"),
    "a web page": b"\n<!DOCTYPE html><title>Sign in</title>",
    "first bytes are b'half a file'": b"half a file",
}


@pytest.mark.parametrize("description", OTHER_FILES)
def test_another_file_under_the_name_is_described(hdf5: Path, description: str) -> None:
    hdf5.write_bytes(OTHER_FILES[description])
    with pytest.raises(UserError, match=f"is not an HDF5 file, it.* {re.escape(description)}"):
        open_images(hdf5.parent, "train")


def test_what_is_not_a_file_is_described(hdf5: Path) -> None:
    hdf5.unlink()
    for make, words in (
        (lambda: hdf5.symlink_to("/gone/away"), "is a link to /gone/away, which does not exist"),
        (lambda: hdf5.symlink_to(hdf5), "cannot be read: Too many levels of symbolic links"),
        (lambda: os.mkfifo(hdf5), "is a device or pipe, not an HDF5 file"),
    ):
        make()
        with pytest.raises(UserError, match=words):
            open_images(hdf5.parent, "train")
        hdf5.unlink()
    hdf5.mkdir()
    with pytest.raises(UserError, match="is a folder, not an HDF5 file"):
        open_images(hdf5.parent, "train")


def test_a_file_behind_a_user_block_is_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w", userblock_size=1024) as file:
        file["A"] = np.bytes_(jpeg(20))
    assert Hdf5Images(tmp_path / "a.hdf5").read(["A"]) == [jpeg(20)]


def test_a_file_that_another_program_writes_is_not_called_damaged(hdf5: Path) -> None:
    writer = "import h5py, sys; file = h5py.File(sys.argv[1], 'a'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", writer, hdf5], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        with pytest.raises(UserError, match="is open for writing in another program; close it"):
            Hdf5Images(hdf5)
        process.communicate(b"\n")
    assert len(Hdf5Images(hdf5)) == 9


def test_a_file_whose_writer_was_killed_is_not_called_damaged(tmp_path: Path) -> None:
    writer = """
import h5py, os, sys
file = h5py.File(sys.argv[1], "w", libver="latest")
file["A"] = 1
file.flush()
os._exit(1)
"""
    subprocess.run([sys.executable, "-c", writer, tmp_path / "a.hdf5"], check=False)
    with pytest.raises(UserError, match=r"is marked as open for writing; .* `h5clear -s"):
        Hdf5Images(tmp_path / "a.hdf5")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (11, "is open for writing in another program"),
        (37, "cannot be locked (No locks available); .* set HDF5_USE_FILE_LOCKING=FALSE"),
    ],
)
def test_a_file_system_without_locks_is_named(
    hdf5: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    """The text of HDF5; h5py before 3.11 raises an OSError without a number."""

    def locked(*_: object) -> None:
        raise OSError(
            f"Unable to open file (unable to lock file, errno = {number}, error message = 'x')"
        )

    monkeypatch.setattr(h5py.h5f, "open", locked)
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
        build_index(hdf5)


def add_odd_entries(path: Path) -> None:
    """Add entries that are not images, as found in HDF5 files."""
    with h5py.File(path.with_name("elsewhere.hdf5"), "w") as file:
        file["A"] = np.bytes_(jpeg(33))
    with h5py.File(path, "a") as file:
        file["group/nested"] = np.bytes_(jpeg(20))
        file["type"] = np.dtype("f8")
        file["soft"], file["loop"] = h5py.SoftLink("/gone"), h5py.SoftLink("/loop")
        file["lost"] = h5py.ExternalLink("gone.hdf5", "/A")
        file["pixels"], file["floats"] = np.zeros((60, 50, 3), np.uint8), np.zeros(7)
        file["mask"] = np.zeros((6, 5), bool)
        file["nothing"], file["no bytes"] = h5py.Empty("S3"), np.zeros(0, np.uint8)
        file["same"], file["hard"] = h5py.SoftLink("/ISIC_0000001"), file["ISIC_0000001"]
        file["elsewhere"] = h5py.ExternalLink("elsewhere.hdf5", "/A")
        scalar = h5py.h5s.create(h5py.h5s.SCALAR)
        h5py.h5d.create(file.id, b"not \xff UTF-8", h5py.h5t.NATIVE_INT8, scalar)


def test_entries_that_are_not_images_are_left_out_with_their_reason(hdf5: Path) -> None:
    add_odd_entries(hdf5)
    store = Hdf5Images(hdf5)
    link = "which cannot be opened"
    array = "not the bytes of an image file"
    assert store.rejected == {
        "group": "a group",
        "type": "not a dataset",
        "soft": f"a link to /gone, {link}",
        "loop": f"a link to /loop, {link}",
        "lost": f"a link to /A in gone.hdf5, {link}",
        "pixels": f"an array of 60 x 50 x 3 values, {array}",
        "floats": f"an array of 7 values, {array}",
        "mask": f"an array of 6 x 5 values, {array}",
    }
    assert set(store.ids) - set(FILES) == {
        *("nothing", "no bytes", "same", "hard", "elsewhere", "not \\xff UTF-8")
    }
    assert store.read([*FILES, "same", "hard"]) == [*FILES.values(), *[FILES["ISIC_0000001"]] * 2]
    assert store.read(["elsewhere"]) == [jpeg(33)], "not the bytes at its offset in this file"
    ids = ["soft", "ISIC_0000002", "absent", "nothing", "no bytes", "pixels"]
    out = np.empty((6, 32, 32, 3), np.uint8)
    reasons = [store.rejected["soft"], "no image for this id", *["zero bytes"] * 2]
    assert store.decode(ids, SPEC, out) == dict(
        zip((0, 2, 3, 4, 5), [*reasons, store.rejected["pixels"]], strict=True)
    )


def test_what_was_left_out_is_known_from_the_cache(cached: Path, hdf5: Path) -> None:
    add_odd_entries(hdf5)
    built = Hdf5Images(hdf5)
    known = Hdf5Images(hdf5)
    assert dict(known.rejected) == dict(built.rejected)
    assert len(known.rejected) == 8


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({}, "holds no images$"),
        ({"images/A": np.bytes_(jpeg(20))}, r"the first of its 1 entries is images \(a group\)"),
        (
            {"A": np.zeros((9, 8, 3), np.uint8)},
            r"is A \(an array of 9 x 8 x 3 values, not the bytes",
        ),
    ],
)
def test_a_file_without_images_is_refused(
    tmp_path: Path, entries: dict[str, Any], words: str
) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name, value in entries.items():
            file[name] = value
    with pytest.raises(UserError, match=words):
        Hdf5Images(tmp_path / "a.hdf5")


def test_random_damage_of_a_file_is_reported(hdf5: Path) -> None:
    whole, random = hdf5.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole)
        at, length = int(random.integers(len(whole))), int(random.integers(1, 200))
        damaged[at : at + length] = random.bytes(len(damaged[at : at + length]))
        hdf5.write_bytes(damaged)
        with contextlib.suppress(UserError):
            store = Hdf5Images(hdf5)
            store.read_each([*FILES, *store.ids.tolist()])


def test_a_signal_that_arrives_while_names_are_read_keeps_its_kind(
    hdf5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a full-size file is indexed; HDF5's iteration would raise a SystemError."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(h5py.h5d, "open", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_index(hdf5)
    assert len(build_index(hdf5).ids) == 9


@pytest.mark.parametrize(
    "claim",
    [
        {"shape": (2**36,), "dtype": "u1", "chunks": (2**20,)},
        {"shape": (2**18, 2**18), "dtype": "S1000", "chunks": (1, 99)},
    ],
)
def test_an_entry_that_claims_more_than_any_image_is_not_read(
    claim: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "train-image.hdf5"
    with h5py.File(path, "w") as file:
        file["good"] = np.bytes_(jpeg())
        file.create_dataset("huge", **claim)
    store = Hdf5Images(path)
    _, failed = store.load(["good", "huge"], SPEC)
    assert list(failed) == [1]
    assert "it claims" in failed[1] or "values, not the bytes" in failed[1]
