"""The local folder of a run whose output is remote: what the remote folder has, in short.

Every remote file is there: those that a run reads in full, the others, such as shards, empty. So a
run finds the shards that are done as it does in a local folder.
"""

import contextlib
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from infer.embedding.store import RUN_FILE, RUN_SPEC_FILE
from isic.layout import ERRORS_FILE, FOLDS_FILE
from isic.runtime.files import atomic_path
from isic.runtime.remote import Storage, locked
from isic.runtime.urls import url_of

READ = (RUN_SPEC_FILE, RUN_FILE, ERRORS_FILE, FOLDS_FILE, "errors-*.parquet")
"""Names of the files that a run reads."""


@contextlib.contextmanager
def staged(root: Path) -> Iterator[None]:
    """Fill the local folder of a remote run for the block; for a local run, do nothing.

    Args:
        root: the folder of a config's embeddings.

    Raises:
        UserError: the remote folder cannot be read, or a process on this machine writes into it.
    """
    url = url_of(root, "staged")
    if url is None:
        yield
        return
    busy = f"another process embeds into {url}; wait for its end, or choose another --output_dir"
    with locked(root.with_name(f".{root.name}.lock"), busy, wait=False):
        # Shards that were not uploaded whole are made again.
        shutil.rmtree(root, ignore_errors=True)
        try:
            _fill(root, Storage(url))
            yield
        finally:
            shutil.rmtree(root, ignore_errors=True)


def _fill(root: Path, storage: Storage) -> None:
    for name, file in storage.find().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if any(fnmatchcase(path.name, pattern) for pattern in READ):
            with atomic_path(path) as temporary:
                temporary.write_bytes(storage.read(file.path))
        else:
            path.touch()


def delete_run(directory: Path) -> None:
    """Delete the files of a split, the remote ones too."""
    url = url_of(directory, "staged")
    if url is not None:
        storage = Storage(url)
        # First the file that marks a run as finished.
        names = sorted(storage.find(), key=lambda name: (name != RUN_FILE, name))
        storage.delete(names)
    shutil.rmtree(directory)
