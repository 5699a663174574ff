from pathlib import Path

from isic.layout import fold_dir, fold_dirs, fold_files


def test_folds_are_listed_by_number_without_copies_and_files(tmp_path: Path) -> None:
    for name in ("fold_10", "fold_2", "fold_0_old", "fold_2 (copy)", "fold_x", "xfold_1"):
        (tmp_path / name).mkdir()
    (tmp_path / "fold_3").touch()
    folders = fold_dirs(tmp_path)
    assert list(folders) == [2, 10]
    assert folders == {fold: fold_dir(tmp_path, fold) for fold in (2, 10)}


def test_files_are_listed_for_the_folds_that_have_them(tmp_path: Path) -> None:
    for fold in (0, 1):
        fold_dir(tmp_path, fold).mkdir()
    path = fold_dir(tmp_path, 1) / "oof.parquet"
    path.touch()
    assert fold_files(tmp_path, "oof.parquet") == {1: path}


def test_a_folder_that_does_not_exist_has_no_folds(tmp_path: Path) -> None:
    assert fold_dirs(tmp_path / "absent") == {}
