import time

from benchmarks.timing import batches, seconds_of


def test_batches_are_slices_in_order() -> None:
    assert list(batches("abcde", 2)) == ["ab", "cd", "e"]
    assert list(batches([], 2)) == []


def test_a_call_is_timed() -> None:
    assert 0.01 <= seconds_of(lambda: time.sleep(0.01)) < 1
