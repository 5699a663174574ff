import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isic.errors import UserError
from isic.files import (
    atomic_path,
    manifest_path,
    read_json,
    read_manifest,
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
        "import sys, time\nfrom pathlib import Path\nfrom isic.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as t:\n    t.write_text('half'); print('ready', flush=True)\n"
        "    time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    time.sleep(0.05)
    assert path.read_text() == "former"


def test_a_full_disk_and_a_read_only_folder_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the disk is full"), atomic_path(tmp_path / "f"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another output folder"):
        write_text(tmp_path / "file" / "below", "x")


def test_a_folder_in_the_way_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*there"):
        write_text(tmp_path / "there", "text")


def test_a_manifest_knows_its_artifact(tmp_path: Path) -> None:
    artifact = tmp_path / "model.onnx"
    artifact.write_bytes(b"bytes")
    write_manifest(artifact, fold=3)
    assert read_manifest(artifact)["fold"] == 3
    artifact.write_bytes(b"other")
    with pytest.raises(UserError, match="not the file its manifest describes"):
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
