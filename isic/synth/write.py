"""Files of the stand-in dataset: HDF5 in the challenge's layout, byte for byte the same for the same content."""

from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
import polars as pl

from isic.files import atomic_path


def write_images(path: Path, images: Iterable[tuple[str, bytes]]) -> None:
    """Writes one scalar dataset per id at the root: fixed-length bytes, contiguous, no times kept.

    The low-level calls of h5py, because the high-level ones take minutes for a full-size dataset.

    Args:
        images: id and file content, ids ascending.
    """
    scalar = h5py.h5s.create(h5py.h5s.SCALAR)
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)  # times would make two equal runs differ
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
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
