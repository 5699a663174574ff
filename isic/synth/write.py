"""Files of datasets that this toolkit writes: equal content gives equal bytes."""

import os
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
import polars as pl

from isic.runtime.files import atomic_path

HEADER_BYTES = 400
"""Approximate overhead per image in the file."""


def write_images(
    path: Path, images: Iterable[tuple[str, bytes]], num_bytes: int | None = None
) -> None:
    """Write one scalar HDF5 dataset per id, of fixed-length bytes, as the challenge does.

    Args:
        images: id and file content, ids ascending.
        num_bytes: the size of all files with HEADER_BYTES each; without it they are all held in
            memory.

    Raises:
        UserError: the disk is too small for them.
    """
    # Their size must be known before the file is opened.
    if num_bytes is None:
        images = list(images)
        num_bytes = sum(len(data) + HEADER_BYTES for _, data in images)
    with atomic_path(path) as temporary:
        _refuse_small_disk(temporary, num_bytes)
        with h5py.File(temporary, "w") as file:
            _write_all(file, images)


def _refuse_small_disk(path: Path, num_bytes: int) -> None:
    """Raise an OSError if a file cannot become so large: by the disk, a quota or a limit."""
    # HDF5 segfaults when a write fails (h5py#914); the check can go once it raises an OSError.
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))
        file.truncate(0)


def _write_all(file: h5py.File, images: Iterable[tuple[str, bytes]]) -> None:
    """Use h5py's low-level API: the high-level one takes minutes for a full-size dataset."""
    scalar = h5py.h5s.create(h5py.h5s.SCALAR)
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)  # timestamps would differ between equal runs
    for name, data in images:
        kind = h5py.h5t.C_S1.copy()
        kind.set_size(len(data))
        kind.set_strpad(h5py.h5t.STR_NULLPAD)
        dataset = h5py.h5d.create(file.id, name.encode(), kind, scalar, properties)
        value = np.array(data, dtype=f"S{len(data)}")
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, value, kind)


def write_table(path: Path, table: pl.DataFrame) -> None:
    """Write a CSV; blanks are empty fields."""
    with atomic_path(path) as temporary:
        table.write_csv(temporary)
