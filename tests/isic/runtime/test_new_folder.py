import shutil
from pathlib import Path
from threading import Barrier

import pytest

from isic.runtime import files
from isic.runtime.errors import UserError
from isic.runtime.files import new_folder
from tests.support.datasets import small_disk


def test_a_folder_is_there_completely_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "new"
    with pytest.raises(KeyError), new_folder(target) as folder:
        (folder / "file").touch()
        raise KeyError
    assert not any(target.parent.iterdir())
    with new_folder(target) as folder:
        (folder / "file").touch()
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["new"]
    assert (target / "file").is_file()


def test_a_full_disk_is_reported_and_nothing_is_left(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "large").write_bytes(bytes(100_000))
    with small_disk(tmp_path / "disk", "8k"):
        target = tmp_path / "disk" / "new"
        with pytest.raises(UserError, match="the disk is full"), new_folder(target) as folder:
            shutil.copytree(source, folder / "copy")
        assert not any(target.parent.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), new_folder(tmp_path / "file" / "new"):
        pass


def test_files_reach_the_disk_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, each would wait for the disk's journal."""
    both = Barrier(2, timeout=60)
    monkeypatch.setattr(files, "sync", lambda _: both.wait())
    (tmp_path / "folder").mkdir()
    files.sync_tree(tmp_path)

    def fail(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", fail)
    with pytest.raises(OSError, match="No space"):
        files.sync_tree(tmp_path)


def test_an_error_of_another_file_is_not_taken_for_one_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), new_folder(tmp_path / "new"):
        raise PermissionError(13, "Permission denied", "input")
    assert not any(tmp_path.iterdir())
