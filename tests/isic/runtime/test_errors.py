"""Texts of errors."""

from isic.runtime.errors import first_line


def test_the_first_line_of_an_error() -> None:
    assert first_line(RuntimeError("\nshape mismatch\nTraceback ...")) == "shape mismatch"
    assert first_line(RuntimeError()) == "RuntimeError"
