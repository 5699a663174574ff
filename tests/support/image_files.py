"""Files of images on disk, and reading them as a user without a home."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from isic.preprocess import PreprocessSpec
from isic.runtime.errors import UserError
from tests.support.datasets import jpeg

SPEC = PreprocessSpec(size=32)
FILES = {f"ISIC_{i:07d}": jpeg(50 + i, seed=i) for i in range(9)}
"""Nine images by id; the fixture `hdf5` writes them to a file."""

NOBODY = 12345
"""A user without an entry in the list of accounts, so without a home."""


def write_files(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(20 + number))


def as_nobody(work: Callable[[], object], variables: Mapping[str, str] | None = None) -> str:
    """Run `work` as a user without a home, in a fork. Returns its result or UserError as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        for name in ("HOME", "XDG_CACHE_HOME", "ISIC_CACHE_DIR"):
            os.environ.pop(name, None)
        os.environ.update(variables or {})
        try:
            os.write(writer, str(work()).encode())
        except UserError as error:
            os.write(writer, f"UserError: {error}".encode())
        except BaseException as error:
            os.write(writer, f"{type(error).__name__} escaped: {error}".encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        result = file.read().decode()
    os.waitpid(child, 0)
    return result
