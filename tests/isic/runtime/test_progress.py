"""The expected time of a long run."""

import pytest

from isic.runtime import progress
from isic.runtime.progress import TimeLeft, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (45, "45 s"), (89, "89 s"), (95, "2 min"), (3600, "60 min"), (12600, "3.5 h")],
)
def test_a_duration_is_in_one_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_the_time_left_is_printed_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    left = TimeLeft(6, "training")
    left.skip(1)
    for seconds in (60, 130, 200):
        clock.now = seconds
        left.advance()
    assert capsys.readouterr().out == "training: about 4 min left\n"


def test_a_short_run_has_no_estimate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    left = TimeLeft(3, "export")
    for seconds in (2, 4, 6):
        clock.now = seconds
        left.advance()
    assert capsys.readouterr().out == ""


def test_the_first_batches_of_a_long_run_are_too_early(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    left = TimeLeft(400_000, "embedding")
    for seconds, images in ((1, 64), (5, 2_000), (11, 4_000)):
        clock.now = seconds
        left.advance(images)
    assert capsys.readouterr().out == "embedding: about 12 min left\n"
