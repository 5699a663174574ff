"""A signal ends a run, no matter when it arrives."""

import os
import signal
import subprocess
import sys

import pytest

from isic.runtime.interrupt import (
    SIGNALS,
    Interrupted,
    defer_signals,
    interruptible,
    raise_if_interrupted,
)


class Finalized:
    """Receives a signal in its destructor."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_within_a_destructor_is_neither_lost_nor_printed(number: signal.Signals) -> None:
    passed = False
    with pytest.raises(Interrupted, match=number.name), interruptible():
        Finalized(number)
        passed = True  # Python dropped the exception
        raise_if_interrupted()
    assert passed
    with pytest.raises(Interrupted), interruptible():
        Finalized(number)
    with interruptible():
        raise_if_interrupted()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_held_comes_at_the_end(number: signal.Signals) -> None:
    reached = []
    with pytest.raises(Interrupted, match=number.name), interruptible():
        with defer_signals():
            os.kill(os.getpid(), number)
            reached.append("the end of the block")
        reached.append("what follows")
    assert reached == ["the end of the block"]
    with interruptible(), defer_signals():
        pass


LEFT = """
import multiprocessing.resource_sharer as sharing, socket, torch
from isic.runtime.interrupt import ignore_signals_in_worker
from torch.utils.data import DataLoader

connect, left = sharing._resource_sharer.get_connection, []

def leave_then_connect(ident):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(ident[0])
    left.append(ident)
    return connect(ident)  # served after the abandoned connection

type(sharing._resource_sharer).get_connection = staticmethod(leave_then_connect)
loader = DataLoader(
    torch.arange(8.0), batch_size=4, num_workers=1, worker_init_fn=ignore_signals_in_worker
)
assert torch.equal(torch.cat(list(loader)), torch.arange(8.0)) and left
"""


def test_a_loader_is_quiet_if_its_main_process_ends_while_it_takes_a_batch() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LEFT], capture_output=True, text=True, check=False, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (0, "")
