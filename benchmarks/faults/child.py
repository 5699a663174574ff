"""A function in a forked process, with limits on its time and memory, and its output caught."""

import faulthandler
import multiprocessing
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from isic.runtime.cli import report_error
from isic.runtime.errors import UserError

MAX_SECONDS = 120.0
"""Time limit of a child."""
MAX_CPU_SECONDS = 40
EXTRA_MB = 2000.0
"""Memory that a child may need in addition to that of its parent."""
EXTRA_ADDRESSES = 6 * 2**30
"""Bytes of addresses that a child may reserve in addition: far more than it may use."""
UNCAUGHT = 1
"""Exit code of an exception that nothing caught, as the interpreter's own."""


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int | None
    """The exit code; None if a signal ended it."""
    signal: int | None
    is_late: bool
    """Whether it took longer than MAX_SECONDS."""
    seconds: float
    extra_mb: float
    """Peak memory above that of the parent."""
    out: str
    err: str

    @property
    def problem(self) -> str | None:
        """Why this is neither a success nor a refusal; None if it may be one."""
        lines = self.err.strip().splitlines()
        last_line = lines[-1][:300] if lines else "no output"
        if self.is_late:
            return f"no end within {self.seconds:.0f} s"
        if self.signal is not None:
            return f"signal {self.signal}: {last_line}"
        if self.extra_mb > EXTRA_MB:
            return f"{self.extra_mb:.0f} MB of memory"
        return f"exit code {self.code}: {last_line}" if self.code not in (0, 2) else None


def run_child(work: Callable[[], object], folder: Path) -> Ended:
    """Run a function as a command's main function in a fork, with `folder` as working directory.

    The parent must have no threads. Standard output and error are written to files in `folder`.
    """
    out, err = folder / "stdout", folder / "stderr"
    started = time.monotonic()
    before = _private_mb()
    child = os.fork()
    if not child:
        _run(work, folder, out, err)
    watch = os.pidfd_open(child)
    try:
        is_late = not select.select([watch], [], [], MAX_SECONDS)[0]
    finally:
        os.close(watch)
        _end_group(child)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return Ended(
        code if code >= 0 else None,
        -code if code < 0 else None,
        is_late,
        time.monotonic() - started,
        usage.ru_maxrss / 1024 - before,
        out.read_text("utf-8", "replace") if out.exists() else "",
        err.read_text("utf-8", "replace") if err.exists() else "",
    )


def _end_group(child: int) -> None:
    """Kill the processes that remain of a child's group."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # it has ended, or has no group yet
        os.kill(child, signal.SIGKILL)


def _run(work: Callable[[], object], folder: Path, out: Path, err: Path) -> None:
    """Run the function in the child and exit."""
    code = UNCAUGHT
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        faulthandler.disable()  # a signal is reported by the parent
        os.chdir(folder)
        for path, number in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        # A test's own streams may write elsewhere.
        sys.stdout, sys.stderr = (open(n, "w", 1, "utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
        # The worker was spawned, which its children inherit; commands have the usual method.
        multiprocessing.set_start_method("fork", force=True)
        _limit()
        code = _exit_code(work)
        for thread in threading.enumerate():  # as the interpreter does when it ends
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS))
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + EXTRA_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _exit_code(work: Callable[[], object]) -> int:
    """Return the exit code of a function as that of a command."""
    try:
        work()
    except UserError as error:
        return report_error(str(error))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return UNCAUGHT
    return 0


def _private_mb() -> float:
    """Return the memory of this process that a fork has too; that of mapped files it has not."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024
