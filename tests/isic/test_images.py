import contextlib
import gzip
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import PIL.Image
import polars as pl
import pytest
from numpy.typing import NDArray

from isic import cache
from isic import hdf5 as hdf5_module
from isic import images as images_module
from isic.cache import index_path
from isic.dataset import Dataset
from isic.hdf5 import NO_OFFSET, build_index
from isic.images import FolderImages, Hdf5Images, decode_pool, open_images
from isic.preprocess import ImageError, Pixels, PreprocessSpec, decode
from isic.runtime.errors import UserError
from tests.support.datasets import jpeg, small_disk, write_hdf5

SPEC = PreprocessSpec(size=32)
FILES = {f"ISIC_{i:07d}": jpeg(50 + i, seed=i) for i in range(9)}


@pytest.fixture
def hdf5(tmp_path: Path) -> Path:
    write_hdf5(tmp_path / "train-image.hdf5", FILES)
    return tmp_path / "train-image.hdf5"


def test_bytes_by_offset_are_the_files(hdf5: Path) -> None:
    store = Hdf5Images(hdf5)
    assert (build_index(hdf5).offsets > 0).all()
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
    assert index.ids.tolist() == [b"chunked", b"plain", b"variable"]
    chunked, plain, variable = index.offsets
    assert chunked == variable == NO_OFFSET
    assert plain > 0
    store = Hdf5Images(path)
    assert store.read(["chunked", "plain", "variable"]) == [FILES["ISIC_0000001"]] * 3


@pytest.fixture
def cached(hdf5: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The index of `hdf5` in the cache, as of a file that was written a while ago."""
    monkeypatch.setenv("ISIC_CACHE_DIR", str(hdf5.parent / "cache"))
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1.0)
    Hdf5Images(hdf5)
    path = index_path(hdf5)
    assert path is not None and path.is_file()
    return path


def test_the_index_is_cached(cached: Path, hdf5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "build_index", lambda path: pytest.fail("built again"))
    assert len(Hdf5Images(hdf5)) == 9
    assert not [path for path in hdf5.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_changed_file_is_indexed_again_whatever_its_size_and_time(
    cached: Path, hdf5: Path, in_place: bool
) -> None:
    """Images of one size in another order: by stale offsets each id would get another id's image."""
    files = {name: jpeg(20, value) for name, value in zip("ABC", (50, 110, 200), strict=True)}
    assert len({len(data) for data in files.values()}) == 1
    write_hdf5(hdf5, files)
    former, before = Hdf5Images(hdf5), hdf5.stat()
    other = hdf5.with_name("other")
    write_hdf5(other, dict(reversed(files.items())))
    if in_place:
        hdf5.write_bytes(other.read_bytes())
    else:
        other.replace(hdf5)
    os.utime(hdf5, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = hdf5.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    store = Hdf5Images(hdf5)
    assert store.read(["A", "B", "C"]) == list(files.values())
    assert store._offsets.tolist() != former._offsets.tolist()


def test_a_file_that_was_just_written_is_not_cached(
    hdf5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that counts in seconds, another change could leave the same time."""
    monkeypatch.setenv("ISIC_CACHE_DIR", str(hdf5.parent / "cache"))
    assert len(Hdf5Images(hdf5)) == 9
    assert not (hdf5.parent / "cache").exists()


def test_a_damaged_index_is_built_again(cached: Path, hdf5: Path) -> None:
    whole = cached.read_bytes()
    damages = [b"not an archive", b"", whole[: len(whole) // 2]]
    damages.append(whole.replace(b"sizes.npy", b"sises.npy"))
    random = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(whole)
        for at in random.integers(0, len(whole), 3):
            damaged[at] = random.integers(256)
        damages.append(bytes(damaged))
    for damaged in damages:
        cached.write_bytes(damaged)
        store = Hdf5Images(hdf5)
        assert store.read(list(FILES)) == list(FILES.values())
    cached.unlink()
    cached.mkdir()
    assert len(Hdf5Images(hdf5)) == 9, "what is in its place may be anything"


def test_two_files_never_share_an_index(cached: Path, hdf5: Path) -> None:
    other = hdf5.with_name("other.hdf5")
    os.link(hdf5, other)  # even the inode is the same
    (hdf5.parent / "linked").symlink_to(hdf5)
    assert index_path(other) != cached == index_path(hdf5.parent / "linked")
    odd = os.fsencode(hdf5.parent) + b"/\xff.hdf5"
    os.link(hdf5, odd)
    assert len(Hdf5Images(Path(os.fsdecode(odd)))) == 9


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ISIC_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/isic-toolkit"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/isic-toolkit"),
        ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/isic-toolkit"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("ISIC_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_folder() == Path(expected)


NOBODY = 12345
"""A user without an entry in the list of accounts, so without a home."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_nobody(work: Callable[[], object], variables: Mapping[str, str] | None = None) -> str:
    """Returns the result of `work`, or its UserError, in a fork of this process as a user without a home."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        for name in ("HOME", "XDG_CACHE_HOME", "ISIC_CACHE_DIR"):
            os.environ.pop(name, None)
        os.environ.update(variables or {})
        try:
            os.write(writer, str(work()).encode())
        except UserError as error:
            os.write(writer, f"UserError: {error}".encode())
        except BaseException as error:
            os.write(writer, f"{type(error).__name__} escaped: {error}".encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        result = file.read().decode()
    os.waitpid(child, 0)
    return result


@as_root
@pytest.mark.parametrize(
    "variables", [{}, {"XDG_CACHE_HOME": "/proc"}, {"ISIC_CACHE_DIR": "/nowhere"}]
)
def test_without_a_home_or_a_cache_it_works(
    shared_folder: Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1.0)
    path = shared_folder / "train-image.hdf5"
    write_hdf5(path, FILES)
    assert as_nobody(lambda: len(Hdf5Images(path).read(list(FILES))), variables) == "9"


def test_a_full_cache_is_no_cache(hdf5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1.0)
    monkeypatch.setenv("ISIC_CACHE_DIR", str(hdf5.parent / "full"))
    with small_disk(hdf5.parent / "full", "4k"):
        (hdf5.parent / "full" / "rest").write_bytes(b"x" * 4096)
        assert len(Hdf5Images(hdf5)) == 9


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
        assert process.stdout is not None and process.stdout.readline()
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
    """Adds what is found in HDF5 files beside images."""
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
    array = "not the bytes of a JPEG or PNG file"
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
    assert dict(known.rejected) == dict(built.rejected) and len(known.rejected) == 8


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


def test_random_damage_of_a_file_is_a_sentence(hdf5: Path) -> None:
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
    """Ctrl-C in the seconds that a full-size file takes; inside HDF5's iteration it would be a SystemError."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(h5py.h5d, "open", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_index(hdf5)
    assert len(build_index(hdf5).ids) == 9


def test_a_folder_of_jpegs_reads_alike(tmp_path: Path, hdf5: Path) -> None:
    folder = tmp_path / "other" / "train-image" / "image"
    folder.mkdir(parents=True)
    for name, data in FILES.items():
        (folder / f"{name}.jpg").write_bytes(data)
    store = open_images(tmp_path / "other", "train")
    assert isinstance(store, FolderImages)
    assert store.read(list(FILES)) == list(FILES.values()) == Hdf5Images(hdf5).read(list(FILES))
    assert open_images(tmp_path, "test") is None


def write_files(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(20 + number))


def test_a_suffix_may_be_in_any_case_and_the_content_decides(tmp_path: Path) -> None:
    write_files(tmp_path, "A.jpg", "B.JPG", "deep/er/C.Jpeg", "D.png", "E.v2.PNG", "F.tif", "G.txt")
    store = FolderImages(tmp_path)
    assert store.ids.tolist() == ["A", "B", "C", "D", "E.v2"]
    assert store.decode(store.ids.tolist(), SPEC, np.empty((5, 32, 32, 3), np.uint8)) == {}
    assert store.other_files == {".tif": 1, ".txt": 1}


@pytest.mark.parametrize("second", ["A.png", "A.JPG", "128px/A.jpg", "b/A.jpeg"])
def test_two_images_of_one_id_are_refused(tmp_path: Path, second: str) -> None:
    write_files(tmp_path, "A.jpg", "B.jpg", second)
    with pytest.raises(UserError, match="1 images have the id of another one, the first are") as caught:
        FolderImages(tmp_path)
    assert str(tmp_path / "A.jpg") in str(caught.value) and str(tmp_path / second) in str(
        caught.value
    )


def test_files_of_operating_systems_are_ignored(tmp_path: Path) -> None:
    write_files(tmp_path, "A.jpg", "._A.jpg", "__MACOSX/A.jpg", ".thumbs/A.jpg", "Thumbs.db")
    write_files(tmp_path, ".ipynb_checkpoints/A.jpg", "@eaDir/A.jpg/A.jpg")
    store = FolderImages(tmp_path)
    assert store.ids.tolist() == ["A"] and not store.other_files and not store.rejected


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


@as_root
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
    write_files(tmp_path, "A.tif", "B.tif", "notes.txt")
    with pytest.raises(UserError, match=r"holds no images .*it has other files: 2 \.tif, 1 \.txt"):
        FolderImages(tmp_path)
    with pytest.raises(UserError, match=r"A\.tif cannot be read: Not a directory"):
        FolderImages(tmp_path / "A.tif")


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
        assert len(index.ids) == count and (index.offsets > 0).all()
        store = Hdf5Images(tmp_path / "train-image.hdf5")
        with h5py.File(tmp_path / "train-image.hdf5") as file:
            for name in store.ids[:: count // 50]:
                assert store.read([name]) == [file[name][()]]
    ids = Dataset(real_data / "real-pairs").metadata("train")["isic_id"].to_list()
    out = np.empty((len(ids), 32, 32, 3), np.uint8)
    assert Dataset(real_data / "real-pairs").images("train").decode(ids, SPEC, out) == {}
    assert pl.Series(out.reshape(len(ids), -1).std(axis=1)).min() > 0
