"""A signal ends a run, whatever it interrupts."""

import os
import signal
import socket
from multiprocessing import resource_sharer

import pytest
import torch
from torch.utils.data import DataLoader

from isic.interrupt import SIGNALS, Interrupted, check, held, interruptible, leave_to_parent


class Finalized:
    """Its destructor gets a signal, as any code does that runs at an unlucky moment."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_within_a_destructor_is_not_lost(number: signal.Signals) -> None:
    passed = False
    with pytest.raises(Interrupted, match=number.name), interruptible():
        Finalized(number)
        passed = True  # Python dropped the exception
        check()
    assert passed
    with pytest.raises(Interrupted), interruptible():
        Finalized(number)
    with interruptible():
        check()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_held_comes_at_the_end(number: signal.Signals) -> None:
    reached = []
    with pytest.raises(Interrupted, match=number.name), interruptible():
        with held():
            os.kill(os.getpid(), number)
            reached.append("the end of the block")
        reached.append("what follows")
    assert reached == ["the end of the block"]
    with interruptible(), held():
        pass


def test_a_loader_is_quiet_where_its_main_process_ends_while_it_takes_a_batch(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sharer = resource_sharer._resource_sharer  # type: ignore[attr-defined]
    connect, left = sharer.get_connection, []

    def leave_then_connect(ident: tuple[str, int]) -> object:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(ident[0])
        left.append(ident)
        return connect(ident)  # which is served after the one that was left

    monkeypatch.setattr(type(sharer), "get_connection", staticmethod(leave_then_connect))
    loader = DataLoader(torch.arange(8.0), batch_size=4, num_workers=1, worker_init_fn=leave_to_parent)  # type: ignore[arg-type]
    assert torch.equal(torch.cat(list(loader)), torch.arange(8.0)) and left
    assert capfd.readouterr().err == ""
