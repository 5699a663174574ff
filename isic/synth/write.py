"""Files of the stand-in dataset: HDF5 in the challenge's layout, byte for byte the same for the same content."""

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
import polars as pl

from isic.files import atomic_path

HEADER_BYTES = 400
"""What an image takes in the file beside its bytes, about."""


def write_images(path: Path, images: Iterable[tuple[str, bytes]]) -> None:
    """Writes one scalar dataset per id at the root: fixed-length bytes, contiguous, no times kept.

    Args:
        images: id and file content, ids ascending.

    Raises:
        UserError: the disk has no room for them.
    """
    images = list(images)
    needed = sum(len(data) + HEADER_BYTES for _, data in images)
    with atomic_path(path) as temporary:
        if shutil.disk_usage(path.parent).free < needed:  # HDF5 crashes where a disk gets full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with h5py.File(temporary, "w") as file:
            _write_all(file, images)


def _write_all(file: h5py.File, images: Iterable[tuple[str, bytes]]) -> None:
    """By the low-level calls of h5py, because the high-level ones take minutes for a full-size dataset."""
    scalar = h5py.h5s.create(h5py.h5s.SCALAR)
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)  # times would make two equal runs differ
    for name, data in images:
        kind = h5py.h5t.C_S1.copy()
        kind.set_size(len(data))
        kind.set_strpad(h5py.h5t.STR_NULLPAD)
        dataset = h5py.h5d.create(file.id, name.encode(), kind, scalar, properties)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array(data, dtype=f"S{len(data)}"), kind)


def write_table(path: Path, table: pl.DataFrame) -> None:
    """Writes a CSV with blanks as empty fields."""
    with atomic_path(path) as temporary:
        table.write_csv(temporary)
