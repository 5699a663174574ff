"""Memory of the C library's allocator, which training on a CPU asks for the same blocks at every step."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


def keep_freed_memory() -> None:
    """Makes glibc keep what a step frees for the next one; does nothing where the C library is another.

    By default it gives large blocks back to the system, which clears every page anew when the next step touches it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)
