"""Memory for decoded batches that other processes can map."""

import mmap
import os
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

Shape = tuple[int, int, int, int, int]
"""Slots, rows per slot, height, width and 3."""


class Ring:
    """Slots for batches, in memory without a name: the system frees it with its last process.

    It can be passed to a process that is being started, which then has the same memory.
    """

    def __init__(self, shape: Shape, file: int | None = None) -> None:
        """Create a ring, or map an existing one.

        Args:
            shape: of the slots.
            file: descriptor of an existing ring's memory.

        Raises:
            OSError: the process may open no more files.
        """
        num_bytes = int(np.prod(shape))
        if file is None:
            # Not in /dev/shm: a file there outlives a killed process, and containers limit it.
            file = os.memfd_create("isic-ring")
            os.ftruncate(file, num_bytes)
        self._file = file
        self.slots = np.frombuffer(mmap.mmap(file, num_bytes), np.uint8).reshape(shape)
        """uint8 [S, R, size, size, 3]."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _map, (self.slots.shape, DupFd(self._file))

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)  # the memory stays as long as an array on it


def _map(shape: Shape, file: Any) -> Ring:
    return Ring(shape, file.detach())
