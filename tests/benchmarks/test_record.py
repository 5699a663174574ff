from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from benchmarks.record import Row, append_each, append_rows
from benchmarks.untrained import create_untrained
from isic.runtime.errors import UserError


def test_results_are_appended_and_new_columns_are_blank_in_old_rows(tmp_path: Path) -> None:
    append_rows("b", [{"what": "x", "seconds": 1.5}], tmp_path)
    append_rows("b", [{"what": "y", "bytes": 7}], tmp_path)
    rows = pl.read_csv(tmp_path / "b.csv")
    assert rows["what"].to_list() == ["x", "y"]
    assert rows["seconds"].to_list() == [1.5, None]
    assert rows["bytes"].to_list() == [None, 7]
    assert rows["commit"].null_count() == 0
    assert rows["processor"].null_count() == 0


def test_an_error_of_any_type_costs_its_row_only(tmp_path: Path) -> None:
    def rows_of(name: str) -> Iterator[Row]:
        yield {"what": name, "rate": 1}
        if name == "bad":
            raise Exception("a library's own\nwith a page of notes")
        yield {"what": name, "rate": 2}

    append_each("b", ["bad", "good"], rows_of, tmp_path)
    rows = pl.read_csv(tmp_path / "b.csv")
    assert rows["what"].to_list() == ["bad", "bad", "good", "good"]
    assert rows["reason"].to_list() == [None, "Exception: a library's own", None, None]


def test_a_users_error_ends_the_benchmark(tmp_path: Path) -> None:
    def rows_of(name: str) -> Iterator[Row]:
        yield {"what": create_untrained(name).config}

    with pytest.raises(UserError):
        append_each("b", ["vit_tyni"], rows_of, tmp_path)
