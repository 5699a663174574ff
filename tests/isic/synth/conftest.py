"""Samples that several tests share."""

import polars as pl
import pytest

from isic.synth.rows import SyntheticRows
from tests.support.synthetic import draw_synthetic


@pytest.fixture(scope="session")
def large() -> pl.DataFrame:
    """A table of 20,000 rows with the challenge's share of positives."""
    return draw_synthetic(20_000, 20).table


@pytest.fixture(scope="session")
def learnable() -> SyntheticRows:
    return draw_synthetic(3_000, 150)
