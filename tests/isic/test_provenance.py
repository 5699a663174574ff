"""The list of images and patients that a model has learned from."""

from pathlib import Path

import polars as pl
import pytest

from isic.provenance import read_seen, refuse_seen, rows_seen, seen_rows, write_seen
from isic.runtime.errors import UserError
from isic.tables import write_parquet

TRAINED_ON = pl.DataFrame({"isic_id": ["a", "b"], "patient_id": ["p", None]})


def test_a_row_is_seen_by_its_image_or_its_patient(tmp_path: Path) -> None:
    path = tmp_path / "trained_on.parquet"
    write_seen(path, seen_rows(TRAINED_ON))
    table = pl.DataFrame({"isic_id": ["a", "b", "c", "d"], "patient_id": [None, "q", "p", None]})
    assert rows_seen(table, read_seen(path))["isic_id"].to_list() == ["a", "b", "c"]
    with pytest.raises(UserError, match="the model learned from 3 of the 4 held-out rows"):
        refuse_seen(table, read_seen(path), "the model", "train another")
    refuse_seen(table.tail(1), read_seen(path), "the model", "train another")


def test_a_list_includes_inherited_rows() -> None:
    inherited = seen_rows(pl.DataFrame({"isic_id": ["z", "a"], "patient_id": ["q", "p"]}))
    seen = seen_rows(TRAINED_ON, inherited)
    assert seen.rows() == [("a", "p"), ("b", "b"), ("z", "q")]


def test_a_list_that_cannot_be_trusted_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trained_on.parquet"
    with pytest.raises(UserError, match=r"trained_on\.parquet is missing"):
        read_seen(path)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="is damaged: it does not end as a Parquet file does"):
        read_seen(path)
    write_parquet(path, TRAINED_ON)
    with pytest.raises(UserError, match="did not separate training rows from held-out rows"):
        read_seen(path)
