"""Files after a simulated loss of power; those that the toolkit has written survive it."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from benchmarks.faults.outputs import files_of
from benchmarks.faults.power import file_states, lose_power
from tests.support.commands import ROOT

WRITER = """
import os, shutil, sys
from pathlib import Path
from benchmarks.faults.operations import note_operations
from isic.runtime.files import atomic_path, copy_file, new_folder, rename, sync, write_text
for argument in sys.argv[1:]:
    root = Path(argument)
    if os.fork() == 0:
        note_operations(root, root.parent / "place")
        {code}
        os._exit(0)
    assert os.wait()[1] == 0
"""
SEEDS = range(20)
CONTENT = b"content"
Contents = dict[str, set[bytes]]


def survivors(code: str, folder: Path) -> tuple[Contents, int]:
    """Run code that writes below `root`, where `former` is, and lose power afterwards, many times.

    Returns:
        The contents of each file that survives, and how often all of them do.
    """
    roots = [folder / str(seed) / "root" for seed in SEEDS]
    before = []
    for root in roots:
        root.mkdir(parents=True)
        (root / "former").write_bytes(b"former")
        before.append(file_states(root))
    command = [sys.executable, "-c", WRITER.format(code=code), *map(str, roots)]
    subprocess.run(command, cwd=ROOT, check=True)
    found: Contents = {}
    num_whole = 0
    for seed, root in enumerate(roots):
        written = {name: path.read_bytes() for name, path in files_of(root).items()}
        lose_power(root, root.parent / "place", before[seed], Random(seed))
        left = {name: path.read_bytes() for name, path in files_of(root).items()}
        num_whole += left == written
        for name, content in left.items():
            found.setdefault(name, set()).add(content)
    return found, num_whole


def test_a_file_that_is_not_synchronised_loses_its_end_or_its_name(tmp_path: Path) -> None:
    found, num_whole = survivors("(root / 'new').write_bytes(b'content')", tmp_path)
    assert found["former"] == {b"former"}
    assert {b"", CONTENT} < found["new"]
    assert all(CONTENT.startswith(content) for content in found["new"])
    assert 0 < num_whole < len(SEEDS)


def test_a_rename_that_is_not_synchronised_is_undone_or_not(tmp_path: Path) -> None:
    code = "(root / 't').write_bytes(b'content'); sync(root / 't'); (root / 't').replace(root / 'former')"
    found, num_whole = survivors(code, tmp_path)
    assert found["former"] == {b"former", CONTENT}
    assert 0 < num_whole < len(SEEDS)


def test_a_removal_that_is_not_synchronised_is_undone_or_not(tmp_path: Path) -> None:
    found, num_whole = survivors("(root / 'former').unlink()", tmp_path)
    assert found == {"former": {b"former"}}
    assert 0 < num_whole < len(SEEDS)


@pytest.mark.parametrize(
    "code",
    [
        "write_text(root / 'former', 'content')",
        "write_text(root / 'a' / 'b' / 'new', 'content')",
        "copy_file(root / 'former', root / 'a' / 'new')",
        "(root / 't').write_bytes(b'content'); sync(root / 't'); rename(root / 't', root / 'former')",
    ],
)
def test_files_that_the_toolkit_has_written_survive(code: str, tmp_path: Path) -> None:
    _, num_whole = survivors(code, tmp_path)
    assert num_whole == len(SEEDS)


def test_a_folder_that_the_toolkit_has_written_survives(tmp_path: Path) -> None:
    code = """
        with new_folder(root / 'new' / 'folder') as folder:
            (folder / 'deep' / 'er').mkdir(parents=True)
            (folder / 'deep' / 'er' / 'file').write_bytes(b'content')
            shutil.copyfile(root / 'former', folder / 'copy')
    """
    _, num_whole = survivors(code.strip(), tmp_path)
    assert num_whole == len(SEEDS)
