"""Encoded image files of many rows, packed into one buffer."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isic.images import ImageStore

READ_ROWS = 4096
"""Files that are read at once."""


@dataclass(frozen=True)
class PackedFiles:
    """N files in one array, which loader processes share; they would copy a list of bytes."""

    buffer: NDArray[np.uint8]
    starts: NDArray[np.int64]
    """[N]: file i is `buffer[starts[i]:ends[i]]`."""
    ends: NDArray[np.int64]
    """[N]."""

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> bytes:
        return self.buffer[self.starts[row] : self.ends[row]].tobytes()

    def __add__(self, other: "PackedFiles") -> "PackedFiles":
        offset = len(self.buffer)
        return PackedFiles(
            np.concatenate([self.buffer, other.buffer]),
            np.concatenate([self.starts, offset + other.starts]),
            np.concatenate([self.ends, offset + other.ends]),
        )

    @property
    def is_empty(self) -> NDArray[np.bool_]:
        """[N]: files of no bytes."""
        empty: NDArray[np.bool_] = self.starts == self.ends
        return empty

    def digest(self) -> str:
        """Return the SHA-256 of the buffer and of the files' places in it."""
        found = hashlib.sha256(self.buffer.data)
        for places in (self.starts, self.ends):
            found.update(places.data)
        return found.hexdigest()

    def without(self, rows: Iterable[int]) -> "PackedFiles":
        """Return the other rows, on the same buffer."""
        # The bytes of the other rows stay in the buffer, which is not copied.
        kept = np.delete(np.arange(len(self)), list(rows))
        return PackedFiles(self.buffer, self.starts[kept], self.ends[kept])


def empty_files(num_files: int) -> PackedFiles:
    """Return files of no bytes."""
    nowhere = np.zeros(num_files, np.int64)
    return PackedFiles(np.empty(0, np.uint8), nowhere, nowhere)


def read_packed(store: ImageStore, ids: list[str]) -> tuple[PackedFiles, dict[int, str]]:
    """Read the files of `ids`.

    Returns:
        The files, empty if one is absent or unreadable, and the reasons for that by row.
    """
    buffer = bytearray()  # grows in place, so that no file is in memory twice
    sizes: list[int] = []
    failed: dict[int, str] = {}
    for start in range(0, len(ids), READ_ROWS):
        files, reasons = store.read_each(ids[start : start + READ_ROWS])
        for file in files:
            buffer += file
            sizes.append(len(file))
        for row, reason in reasons.items():
            failed[start + row] = reason
    ends = np.cumsum(sizes, dtype=np.int64)
    starts = ends - np.array(sizes, np.int64)
    return PackedFiles(np.frombuffer(buffer, dtype=np.uint8), starts, ends), failed
