"""The CPU time of quick answers."""

from pathlib import Path

import polars as pl
import pytest

from benchmarks import start as module
from benchmarks.settings import StartSettings
from benchmarks.start import measure_start, quick_answers, start


def test_a_quick_answer_has_its_time_and_imports() -> None:
    row = measure_start("isic --version", repeats=1)
    assert row["what"] == "isic --version"
    assert row["cpu_seconds"] > 0
    assert row["heavy_imports"] == ""


def test_every_command_is_asked_for_help_and_with_an_unknown_key() -> None:
    answers = list(quick_answers())
    assert "train --help" in answers
    assert "infer embed --no_such_key 1" in answers
    assert "benchmarks start --help" in answers


def test_rows_are_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "quick_answers", lambda: ["isic --version"])
    start(StartSettings(repeats=1, results=tmp_path))
    assert pl.read_csv(tmp_path / "start.csv")["what"].to_list() == ["isic --version"]
