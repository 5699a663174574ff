"""The cached index of HDF5 files."""

import os
from pathlib import Path

import numpy as np
import pytest

from isic import cache
from isic.cache import index_path
from isic.images import Hdf5Images
from tests.support.datasets import jpeg, small_disk, write_hdf5
from tests.support.image_files import FILES, as_nobody


def test_the_index_is_cached(cached: Path, hdf5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "build_index", lambda path: pytest.fail("built again"))
    assert len(Hdf5Images(hdf5)) == 9
    assert not [path for path in hdf5.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_changed_file_is_indexed_again_whatever_its_size_and_time(
    cached: Path, hdf5: Path, in_place: bool
) -> None:
    """Images of one size in another order: stale offsets would give an id another's image."""
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
    assert len(Hdf5Images(hdf5)) == 9, "a folder in its place is ignored"


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
def test_the_folder_of_the_cache(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("ISIC_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_folder() == Path(expected)


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


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
