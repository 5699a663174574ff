from pathlib import Path

import pytest

from isic.runtime.files import new_folder


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
