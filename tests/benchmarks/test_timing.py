import time

import pytest

from benchmarks.timing import batches, repeated, seconds_of


def test_batches_are_slices_in_order() -> None:
    assert list(batches("abcde", 2)) == ["ab", "cd", "e"]
    assert list(batches([], 2)) == []


@pytest.mark.parametrize(("number", "expected"), [(2, "ab"), (3, "abc"), (7, "abcabca")])
def test_a_sequence_is_repeated_or_cut(number: int, expected: str) -> None:
    assert "".join(repeated("abc", number)) == expected


def test_a_call_is_timed() -> None:
    assert 0.01 <= seconds_of(lambda: time.sleep(0.01)) < 1
