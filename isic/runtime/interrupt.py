"""SIGINT and SIGTERM as an exception that ends a long run in a resumable state."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAUNCHED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Environment variable that only torchrun sets."""
PR_SET_PDEATHSIG = 1
"""prctl's number, from Linux's `sys/prctl.h`."""

_arrived: list[int] = []
"""Signals received inside the `interruptible` block."""
_held: list[bool] = []
"""One entry per active `defer_signals` block."""


class Interrupted(BaseException):
    """A signal ended the run. A BaseException, so that no `except Exception` can swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted inside the block on SIGINT or SIGTERM."""
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(0)  # forked: a loader worker that has not set its own handlers yet
        _arrived.append(number)
        if not _held:
            raise Interrupted(number)

    _arrived.clear()
    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    report = sys.unraisablehook

    def report_others(unraisable: "sys.UnraisableHookArgs") -> None:
        # That of a destructor, with a traceback, although the signal is not lost.
        if not isinstance(unraisable.exc_value, Interrupted):
            report(unraisable)

    sys.unraisablehook = report_others
    try:
        yield
        raise_if_interrupted()
    finally:
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_if_interrupted() -> None:
    """Raise Interrupted if a signal's exception was lost: Python drops those in `__del__`."""
    if _arrived:
        raise Interrupted(_arrived[0])


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Defer signals to the end of the block: an exception raised in mid-fork would be lost."""
    _held.append(True)
    try:
        yield
    finally:
        _held.pop()
    raise_if_interrupted()


@contextlib.contextmanager
def block_sigint() -> Iterator[None]:
    """Block SIGINT in processes that are started inside the block."""
    # Ctrl-C reaches every process of a terminal; workers must leave it to their parent, which then
    # ends them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_torchrun() -> None:
    """Have Linux kill this process if torchrun started it and is killed."""
    # torchrun passes SIGINT and SIGTERM on to its processes. Killed itself, it would leave them
    # waiting for each other, with the GPUs' memory.
    if LAUNCHED_BY_TORCHRUN in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def ignore_signals_in_worker(_: int) -> None:
    """Make a loader worker ignore Ctrl-C and exit quietly on SIGTERM: a `worker_init_fn`."""
    # A terminal sends Ctrl-C to all processes. The main process reports it; workers that failed
    # because of it would only add their own errors.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    sys.excepthook = _report_unless_left


def _report_unless_left(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    """Report an uncaught error, except for a connection that the main process closed."""
    # The thread of multiprocessing.resource_sharer, which hands batches over, calls excepthook.
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, where)
