"""Small images, tables and file systems."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import h5py
import numpy as np
import polars as pl
import pytest

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
"""Real lesions next to the checkout; may be absent."""


def jpeg(side: int = 60, value: int | None = None, seed: int = 0) -> bytes:
    """Return a JPEG of noise, or of one grey value."""
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    image = noise if value is None else np.full((side, side, 3), value, np.uint8)
    return bytes(cv2.imencode(".jpg", image)[1])


def write_hdf5(path: Path, files: dict[str, bytes]) -> None:
    """Write images as the challenge does: one scalar dataset of fixed-length bytes per id."""
    with h5py.File(path, "w") as file:
        for name, data in files.items():
            file.create_dataset(name, data=np.bytes_(data))


def small_table(num_rows: int = 60, num_patients: int = 15) -> pl.DataFrame:
    """Return ids, targets (every third positive) and patients."""
    return pl.DataFrame(
        {
            "isic_id": [f"ISIC_{row:07d}" for row in range(num_rows)],
            "target": [int(row % 3 == 0) for row in range(num_rows)],
            "patient_id": [f"IP_{row % num_patients:07d}" for row in range(num_rows)],
        }
    )


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mounts a file system of a few kilobytes; skips the test if this user may not mount."""
    folder.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not mounted or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
