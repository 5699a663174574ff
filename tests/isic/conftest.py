"""Fixtures of image files."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from isic import cache
from isic.cache import index_path
from isic.images import Hdf5Images
from tests.support.datasets import write_hdf5
from tests.support.image_files import FILES


@pytest.fixture
def hdf5(tmp_path: Path) -> Path:
    write_hdf5(tmp_path / "train-image.hdf5", FILES)
    return tmp_path / "train-image.hdf5"


@pytest.fixture
def cached(hdf5: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The index of `hdf5` in the cache, as of a file that was written a while ago."""
    monkeypatch.setenv("ISIC_CACHE_DIR", str(hdf5.parent / "cache"))
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1.0)
    Hdf5Images(hdf5)
    path = index_path(hdf5)
    assert path is not None
    assert path.is_file()
    return path


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
