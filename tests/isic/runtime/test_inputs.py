"""A table that is replaced while a command runs must not lend its digest to the former rows."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from isic.metadata import read_ids, read_metadata
from isic.runtime.errors import UserError
from isic.runtime.files import sha256
from isic.runtime.inputs import one_command

TABLE = "isic_id,target\nISIC_1,0\nISIC_2,1\n"
READERS = (read_ids, read_metadata, sha256)


def replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_text(TABLE.replace("ISIC_2", "ISIC_3"))
    new.replace(path)


@pytest.mark.parametrize("again", READERS)
@pytest.mark.parametrize("first", READERS[:2])
def test_a_table_that_is_replaced_between_two_readings_is_refused(
    first: Callable[[Path], object], again: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "train-metadata.csv"
    path.write_text(TABLE)
    with one_command():
        first(path)
        again(path)
        replace(path)
        with pytest.raises(UserError, match="was changed while it was read; run the same command"):
            again(path)
    with one_command():
        first(path)
        again(path)


def test_outside_a_command_tables_may_change(tmp_path: Path) -> None:
    path = tmp_path / "train-metadata.csv"
    path.write_text(TABLE)
    before = sha256(path), read_ids(path).to_list()
    replace(path)
    assert (sha256(path), read_ids(path).to_list()) != before


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def copy(path: Path) -> None:
    shutil.copyfile(path, path.with_name("new")).replace(path)


@pytest.mark.parametrize("renew", [touch, copy])
@pytest.mark.parametrize("again", READERS)
@pytest.mark.parametrize("first", READERS[:2])
def test_a_table_that_is_renewed_without_a_change_is_read_on(
    first: Callable[[Path], object],
    again: Callable[[Path], object],
    renew: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    path = tmp_path / "train-metadata.csv"
    path.write_text(TABLE)
    with one_command():
        first(path)
        renew(path)
        again(path)
        replace(path)
        with pytest.raises(UserError, match="was changed"):
            again(path)


def test_a_table_that_is_removed_meanwhile_is_missed(tmp_path: Path) -> None:
    path = tmp_path / "train-metadata.csv"
    path.write_text(TABLE)
    with one_command():
        read_ids(path)
        path.unlink()
        for read in READERS:
            with pytest.raises(UserError, match=str(path)):
                read(path)
