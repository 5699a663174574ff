"""A signal ends a run, whatever it interrupts."""

import os
import signal

import pytest

from isic.interrupt import SIGNALS, Interrupted, check, held, interruptible


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
