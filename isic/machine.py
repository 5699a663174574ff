"""What this process may use of the machine, and what it has used."""

import os
from pathlib import Path


def cores() -> list[int]:
    """Returns the numbers of the cores that this process may use, which in a container are fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def peak_memory_mb() -> int | None:
    """Returns the most memory this process (not its workers) has held, in MB; None where there is no /proc.

    The system's resource usage would do anywhere, but counts what the parent held when it started this process.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), None)
