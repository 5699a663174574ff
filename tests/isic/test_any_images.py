"""A folder or a list of images without a dataset's layout."""

import re
from hashlib import sha256
from pathlib import Path
from threading import Barrier

import cv2
import numpy as np
import polars as pl
import pytest

from isic.any_images import ListedImages, TreeImages, open_any_images
from isic.headers import ImageError
from isic.images import ImageStore
from isic.runtime.errors import UserError
from tests.support.datasets import jpeg


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(16))


def test_the_id_of_a_file_is_its_path_with_the_ending(tmp_path: Path) -> None:
    write(tmp_path, "1.jpg", "a/1.JPG", "b/c/1.png", "a/1.TIFF", "notes.txt")
    (tmp_path / "gone.webp").symlink_to("/nowhere")
    store = open_any_images(tmp_path)
    assert isinstance(store, TreeImages)
    assert store.ids.tolist() == ["1.jpg", "a/1.JPG", "a/1.TIFF", "b/c/1.png"]
    assert store.wanted.to_list() == ["1.jpg", "a/1.JPG", "a/1.TIFF", "b/c/1.png", "gone.webp"]
    files, failed = store.read_each(store.wanted.to_list())
    assert files[:4] == [jpeg(16)] * 4
    assert failed == {4: "a link to /nowhere, which does not exist"}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_list_has_paths_relative_to_its_folder(tmp_path: Path, ending: str) -> None:
    write(tmp_path, "images/b.jpg", "images/a.jpg")
    absolute = str(tmp_path / "images" / "a.jpg")
    table = pl.DataFrame({"path": ["images/b.jpg", absolute, "no.jpg"], "isic_id": [3, 1, 2]})
    path = tmp_path / f"list.{ending}"
    table.write_csv(path) if ending == "csv" else table.write_parquet(path)
    store = open_any_images(path)
    assert isinstance(store, ListedImages)
    assert store.wanted.to_list() == ["3", "1", "2"]
    files, failed = store.read_each(["3", "1", "2"])
    assert files == [jpeg(16), jpeg(16), b""]
    assert failed == {2: "cannot be read: No such file or directory"}


def test_another_uncompressed_image_has_another_digest(tmp_path: Path) -> None:
    """Its size may be the same."""
    first, second = (
        cv2.imencode(".bmp", np.full((4, 4, 3), value, np.uint8))[1].tobytes() for value in (1, 2)
    )
    write(tmp_path, "a.jpg")
    digests = []
    for content in (first, second, first):
        (tmp_path / "b.BMP").write_bytes(content)
        digests.append(open_any_images(tmp_path).sizes_digest())
    assert digests[0] == digests[2] != digests[1]


def test_uncompressed_images_are_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that cannot be read has no part in the digest."""
    for name in "ab":
        write(tmp_path, f"{name}.bmp")
    store = open_any_images(tmp_path)
    both = Barrier(2, timeout=60)

    def read(_: int) -> bytes:
        both.wait()
        return b"content"

    monkeypatch.setattr(store, "read_at", read)
    content = sha256(b"content").digest()
    of_sizes = ImageStore.sizes_digest(store).encode()
    assert store.sizes_digest() == sha256(of_sizes + 2 * content).hexdigest()[:16]

    def fail(_: int) -> bytes:
        raise ImageError

    monkeypatch.setattr(store, "read_at", fail)
    assert store.sizes_digest() == sha256(of_sizes).hexdigest()[:16]


def test_without_an_id_the_path_is_it(tmp_path: Path) -> None:
    write(tmp_path, "images/b.jpg")
    (tmp_path / "list.csv").write_text("path,age\nimages/b.jpg,50\n")
    assert open_any_images(tmp_path / "list.csv").wanted.to_list() == ["images/b.jpg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\na.jpg\n", "lacks the column path; give the column of file paths this name"),
        ("path\n", "has no rows"),
        ("path,isic_id\na.jpg,\n", "1 rows have no isic_id; give every row one"),
        ("path,isic_id\n,a\n", "1 rows have no path; give every row one"),
        ("path\na.jpg\na.jpg\n", "1 values of path are repeated, the first is a.jpg"),
    ],
)
def test_a_bad_list_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        open_any_images(tmp_path / "list.csv")


def test_other_things_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg is neither a folder nor a list of images"):
        open_any_images(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"b does not exist; give a folder or a list"):
        open_any_images(tmp_path / "b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no images"):
        open_any_images(tmp_path / "empty")
