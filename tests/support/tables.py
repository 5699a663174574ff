"""Metadata tables as polars frames."""

import numpy as np
import polars as pl

from isic import schema
from isic.features import SETS
from isic.synth.rows import draw_rows

EXTENDED = SETS["extended"]
"""Names of all features."""


def synthetic_rows(num_rows: int = 240, num_patients: int = 12, seed: int = 0) -> pl.DataFrame:
    """A synthetic table whose patients have from one to many lesions."""
    ids = [f"ISIC_{row:07d}" for row in range(num_rows)]
    patients = [f"IP_{row:07d}" for row in range(num_patients)]
    return draw_rows(ids, patients, num_rows // 10, np.random.default_rng(seed)).table


def lesions(**columns: list[float] | list[str] | list[None]) -> pl.DataFrame:
    """Return rows of one patient: the given columns, and plain values in all others."""
    num_rows = len(next(iter(columns.values())))
    plain = {name: [1.0] * num_rows for name in schema.NUMERIC} | {
        name: ["a"] * num_rows for name in schema.CATEGORICAL
    }
    ids = {
        schema.ID: [f"ISIC_{row}" for row in range(num_rows)],
        schema.PATIENT: ["IP_1"] * num_rows,
    }
    return pl.DataFrame(
        ids | plain | columns,
        schema_overrides={c: schema.DTYPES[c] for c in columns if c in schema.DTYPES},
    )
