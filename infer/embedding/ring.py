"""Memory for decoded batches that other processes can map."""

import mmap
import os
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

from isic.preprocess import Pixels

Shape = tuple[int, int, int, int, int]
"""Slots, rows, height, width and 3."""


@dataclass(frozen=True)
class Ring:
    """Slots for batches, in memory without a name: the system frees it with its last process."""

    slots: Pixels
    """uint8 [S, R, size, size, 3]."""
    file: int
    """Descriptor of the memory."""

    def close(self) -> None:
        """Close the descriptor; the memory lives as long as an array on it."""
        os.close(self.file)


def create_ring(shape: Shape) -> Ring:
    """Create a ring of zeros.

    Raises:
        OSError: the process may open no more files.
    """
    # Not /dev/shm: a file there outlives a killed process, and containers limit it to 64 MB.
    file = os.memfd_create("isic-ring")
    os.ftruncate(file, int(np.prod(shape)))
    return Ring(map_ring(file, shape), file)


def map_ring(file: int, shape: Shape) -> Pixels:
    """Return the slots in the memory of a descriptor, which may be closed afterwards."""
    memory = mmap.mmap(file, int(np.prod(shape)))
    return np.frombuffer(memory, np.uint8).reshape(shape)


@dataclass(frozen=True)
class SharedRing:
    """A ring on its way to a process that is being started."""

    file: Any
    shape: Shape

    @classmethod
    def of(cls, ring: Ring) -> "SharedRing":
        return cls(DupFd(ring.file), ring.slots.shape)

    def open(self) -> Pixels:
        """Return the slots. Call it once, in the new process."""
        file = self.file.detach()
        try:
            return map_ring(file, self.shape)
        finally:
            os.close(file)
