"""Processes as Linux lists them in /proc."""

import re
from pathlib import Path


def children(pid: int, command: str = "") -> list[int]:
    """Return the child processes of a process whose command line contains a text."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if command.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return sorted(found)


def is_running(pid: int) -> bool:
    """Return whether a process exists and does not just wait to be reaped."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return not re.search(r"State:\s+Z", status)
