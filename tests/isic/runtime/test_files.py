import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isic.runtime.errors import UserError
from isic.runtime.files import (
    atomic_path,
    manifest_path,
    read_json,
    read_manifest,
    refuse_foreign,
    remove_folder,
    write_manifest,
    write_text,
)


def test_an_interrupted_write_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "former")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "former")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom isic.runtime.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as t:\n"
        "    t.write_text('half'); print('ready', flush=True)\n"
        "    time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    time.sleep(0.05)
    assert path.read_text() == "former"


def test_a_full_disk_and_a_read_only_folder_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the disk is full"), atomic_path(tmp_path / "f"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    # As Polars reports it.
    with pytest.raises(UserError, match="the disk is full"), atomic_path(tmp_path / "f"):
        raise OSError("No space left on device (os error 28)")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another output folder"):
        write_text(tmp_path / "file" / "below", "x")


def test_a_folder_in_place_of_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*there"):
        write_text(tmp_path / "there", "text")


def test_a_manifest_knows_its_artifact(tmp_path: Path) -> None:
    artifact = tmp_path / "model.onnx"
    artifact.write_bytes(b"bytes")
    write_manifest(artifact, fold=3)
    assert read_manifest(artifact)["fold"] == 3
    artifact.write_bytes(b"other")
    with pytest.raises(UserError, match="does not match its manifest"):
        read_manifest(artifact)
    manifest_path(artifact).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_manifest(artifact)
    manifest_path(artifact).unlink()
    with pytest.raises(UserError, match="is missing"):
        read_manifest(artifact)
    with pytest.raises(UserError, match="no such file"):
        read_manifest(tmp_path / "none.onnx")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        read_json(tmp_path / "list.json")


def test_a_file_system_without_chmod_and_fsync_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some mounts of CIFS and FUSE are."""

    def not_permitted(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def no_sync(_: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    for name in ("chmod", "fchmod"):
        monkeypatch.setattr(os, name, not_permitted)
    monkeypatch.setattr(os, "fsync", no_sync)
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_fails_when_it_is_asked_to_confirm_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write_text(tmp_path / "file", "former")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UserError, match=r"cannot write .*file \(Input/output error\)"):
        write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "former"
    assert len(list(tmp_path.iterdir())) == 1


def test_files_are_for_everybody_whom_the_umask_admits(tmp_path: Path) -> None:
    former = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "text")
    finally:
        os.umask(former)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_name_that_is_too_long_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*File name too long"):
        write_text(tmp_path / ("x" * 250), "text")


def test_a_file_of_another_origin_is_not_replaced(tmp_path: Path) -> None:
    """Nor is the target of a link, and a device not even by its own command."""
    file, link = tmp_path / "file", tmp_path / "link"
    refuse_foreign([file], False, "--output")
    file.write_text("mine")
    link.symlink_to(file)
    (tmp_path / "dead").symlink_to("nowhere")
    for path in (file, link, tmp_path / "dead"):
        with pytest.raises(
            UserError, match=r"was not written by this command.*choose another --output"
        ):
            refuse_foreign([path], False, "--output")
    refuse_foreign([file], True, "--output")
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(UserError, match="is not a regular file"):
            refuse_foreign([path], True, "--output")


def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    for path, words in (
        (tmp_path, r"cannot read .*Is a directory"),
        (tmp_path / "none.json", "is missing"),
        (tmp_path / "bytes.json", "is not text in UTF-8"),
    ):
        with pytest.raises(UserError, match=words):
            read_json(path)


def test_a_folder_is_removed_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of an embedding run without its manifest would be taken for somebody else's."""
    folder = tmp_path / "run"

    def write() -> None:
        folder.mkdir()
        for name in ("manifest.json", "errors.parquet"):
            (folder / name).touch()

    def killed(path: Path, **_: object) -> None:
        if path.is_dir():
            (path / "manifest.json").unlink()
            raise KeyboardInterrupt

    write()
    with monkeypatch.context() as patched:
        patched.setattr("isic.runtime.files.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(folder)
    assert not folder.exists()
    write()
    remove_folder(folder)
    remove_folder(folder)
    assert not list(tmp_path.iterdir())
