"""SIGINT and SIGTERM as an exception that ends a long run cleanly; the same command goes on from there."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_arrived: list[int] = []
"""Signals that this process got within the block."""
_held: list[bool] = []
"""One entry for each `held` block that is being run."""


class Interrupted(BaseException):
    """A signal asked the run to end. No `except Exception` between here and the command may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raises Interrupted in the block on SIGINT or SIGTERM."""
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(0)  # a loader's process that has not yet set its own handlers
        _arrived.append(number)
        if not _held:
            raise Interrupted(number)

    _arrived.clear()
    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
        check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raises Interrupted where a signal came whose exception was lost: Python drops those raised in a destructor."""
    if _arrived:
        raise Interrupted(_arrived[0])


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Lets the block end before a signal is raised: in the middle of a fork there is nobody to catch it."""
    _held.append(True)
    try:
        yield
    finally:
        _held.pop()
    check()


def leave_to_parent(_: int) -> None:
    """Makes a loader's process ignore Ctrl-C, which a terminal sends to all, and end quietly when told to.

    The main process got the same signal and says so; a loader's process that fails would have it complain of that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    sys.excepthook = _report_unless_left


def _report_unless_left(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    """Reports an error of the thread that hands batches over, unless the main process ended while it took one."""
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, where)
