"""A synthetic table and its features."""

import polars as pl
import pytest

from isic.features import compute
from tests.support.tables import EXTENDED, synthetic_rows


@pytest.fixture(scope="module")
def table() -> pl.DataFrame:
    return synthetic_rows()


@pytest.fixture(scope="module")
def extended(table: pl.DataFrame) -> pl.DataFrame:
    return compute(table, EXTENDED)
