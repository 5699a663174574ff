"""Columns made of image scores: each score, and its place among the patient's lesions.

The columns of a network are named after it: `image_score.vit_tiny`,
`image_score_patient_diff.vit_tiny`, `image_score_patient_rank.vit_tiny`.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from isic import schema
from isic.features.relative import PATIENT_CODE, WITHIN, percentile
from isic.metadata import require, with_patient

DIFFERENCE = "patient_diff"
RANKS = {f"{within}_rank": keys for within, keys in WITHIN.items()}
"""Keys of the lesions that a score is ranked among, by the suffix of the column."""

NOISE_STREAM = 1
"""So that the noise is independent of a booster's other random choices."""


def score_column(score: str, network: str, relative: str = "") -> str:
    """Return the name of a column, such as `image_score_patient_rank.vit_tiny`.

    Args:
        score: `image_score` or `frozen_score`.
        relative: DIFFERENCE, a key of RANKS, or empty for the score itself.
    """
    return ".".join(["_".join(filter(None, [score, relative])), network])


@dataclass(frozen=True)
class ImageScores:
    """The scores that networks give to some rows, and the columns made of them."""

    score: str
    """First part of the columns' names."""
    by_network: pl.DataFrame
    """[N] Float64 per network, null for an unreadable image."""
    lesions: pl.DataFrame
    """The result of `group_lesions`."""
    relatives: Sequence[str]
    """The forms to make: empty for the score itself, DIFFERENCE, keys of RANKS."""

    def named(self) -> pl.DataFrame:
        """Return `by_network` with the names of the score's columns."""
        return self.by_network.rename(lambda network: score_column(self.score, network))

    def columns(self) -> pl.DataFrame:
        """Return the columns, [N] Float32 each, by network in the order of `relatives`."""
        return self._columns(self.by_network)

    def noisy_columns(self, deviation: float, seed: tuple[int, int]) -> pl.DataFrame:
        """Return the columns that follow from scores with normal noise.

        Noise is drawn per lesion and network. All columns are computed from the noisy scores: a
        rank of the exact scores would show a booster the order that the noise is to hide. It is
        independent between networks, as their errors on a new image are; with common noise, a
        booster could rely on the exact difference of two networks.
        """
        noisy = self.by_network.with_columns(
            pl.col(name) + pl.Series(_noise(name, len(self.by_network), seed) * deviation)
            for name in self.by_network.columns
        )
        return self._columns(noisy)

    def _columns(self, scores: pl.DataFrame) -> pl.DataFrame:
        # Renamed, so that no network has the name of a key.
        named = scores.rename(lambda network: score_column(self.score, network))
        # In a fixed order of rows, because the last bits of a mean depend on it.
        table = self.lesions.hstack(named[self.lesions["_row"]])
        columns = [
            self._column(network, relative)
            for network in scores.columns
            for relative in self.relatives
        ]
        return table.select("_row", *columns).sort("_row").drop("_row")

    def _column(self, network: str, relative: str) -> pl.Expr:
        value = pl.col(score_column(self.score, network))
        if relative == DIFFERENCE:
            # A difference: a ratio would be meaningless for scores around 0.
            value = value - value.mean().over(PATIENT_CODE)
        elif relative:
            value = percentile(value, RANKS[relative])
        return value.cast(pl.Float32).alias(score_column(self.score, network, relative))


def _noise(network: str, size: int, seed: tuple[int, int]) -> np.ndarray:
    """Return [size] standard normal values, the same ones whatever other networks there are."""
    name = zlib.crc32(network.encode())
    return np.random.default_rng((*seed, NOISE_STREAM, name)).standard_normal(size)


def group_lesions(metadata: pl.DataFrame, relatives: Sequence[str]) -> pl.DataFrame:
    """Return the keys of the lesions that each lesion is compared with, sorted by patient.

    Returns:
        `_row`, the index in `metadata`, PATIENT_CODE, and the other keys that `relatives` read.

    Raises:
        UserError: a column is missing.
    """
    keys = {key for relative in relatives for key in RANKS.get(relative, ())} - {PATIENT_CODE}
    require(metadata, sorted(keys), "the metadata")
    patient = with_patient(metadata)[schema.PATIENT].alias(PATIENT_CODE)
    table = metadata.select(schema.ID, patient, *(pl.col(key).cast(pl.Categorical) for key in keys))
    table = table.with_row_index("_row").sort(PATIENT_CODE, schema.ID).drop(schema.ID)
    return table.with_columns(pl.col(PATIENT_CODE).rle_id().set_sorted())
