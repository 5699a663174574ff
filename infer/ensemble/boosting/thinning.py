"""Patients split into smaller ones, for training and for scores by the number of lesions.

Features relative to a patient are constants for a single lesion, which boosters fitted on whole
patients have hardly seen. Patients are split rather than cut: no row is dropped and no label is
read, so positives are neither more nor less frequent among small patients.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.ensemble.boosting.training_table import TrainingTable
from infer.ensemble.lesions import count_lesions, patient_codes
from isic import schema
from isic.metadata import with_patient

Table = Callable[[pl.DataFrame], TrainingTable]
"""Computes the features of the rows of a metadata table."""

THIN_STREAM = 3
"""Added to a booster's seed."""


def split_patients(
    metadata: pl.DataFrame, size: int | NDArray[np.integer], random: np.random.Generator
) -> pl.DataFrame:
    """Return the table with each patient split at random into groups, each a new patient.

    The result depends on the rows and not on their order, which is kept.

    Args:
        size: lesions per group, the last of a patient may have fewer; for all patients, or [P] in
            the order of `count_lesions`.
    """
    table = with_patient(metadata)
    by_id = table[schema.ID].arg_sort().to_numpy()
    patient = patient_codes(table)
    # Shuffled in the order of ids, then brought together by patient.
    order = by_id[random.permutation(len(table))]
    order = order[np.argsort(patient[order], kind="stable")]
    counts = np.bincount(patient)
    starts = np.cumsum(counts) - counts
    place = np.arange(len(table)) - np.repeat(starts, counts)
    group = np.empty(len(table), np.int64)
    group[order] = place // np.repeat(np.broadcast_to(size, counts.shape), counts)
    # Numbers, because a name with a suffix may be another patient's name.
    parts = pl.DataFrame({"patient": patient, "group": group})
    name = parts.select(pl.format("{}-{}", "patient", "group")).to_series()
    return table.with_columns(name.alias(schema.PATIENT))


def draw_sizes(
    counts: NDArray[np.int64], share: float, random: np.random.Generator
) -> NDArray[np.int64]:
    """Return [P] the size of each patient's groups: for a share of patients, random; else whole.

    Random sizes are log-uniform in 1 to the patient's number of lesions, so that 1 to 2 lesions are
    about as frequent as 50 to 100.

    Args:
        counts: [P] lesions per patient, at least 1.
    """
    sizes = np.floor((counts + 1.0) ** random.random(len(counts))).astype(np.int64)
    # Rounding may lead a power to the next whole number.
    sizes = np.minimum(sizes, counts)
    return np.where(random.random(len(counts)) < share, sizes, counts)


@dataclass
class ThinnedTables:
    """Feature tables in which a share of the patients is split, a different one for each seed."""

    metadata: pl.DataFrame
    table: Table
    share: float
    """Of the patients, in (0, 1]."""
    _tables: dict[int, TrainingTable] = field(default_factory=dict)
    _num_uses: Counter[int] = field(default_factory=Counter)
    _lock: Lock = field(default_factory=Lock)

    def take(self, seed: int, num_uses: int) -> TrainingTable:
        """Return a seed's table. The last of `num_uses` calls forgets it."""
        # One thread computes, with all cores, while the others wait for the same table.
        with self._lock:
            if seed not in self._tables:
                self._tables[seed] = self.compute(seed)
            table = self._tables[seed]
            self._num_uses[seed] += 1
            if self._num_uses[seed] == num_uses:
                del self._tables[seed], self._num_uses[seed]
        return table

    def compute(self, seed: int) -> TrainingTable:
        """Return the feature table of a seed, rows in the order of `metadata`."""
        random = np.random.default_rng((seed, THIN_STREAM))
        sizes = draw_sizes(count_lesions(self.metadata), self.share, random)
        return self.table(split_patients(self.metadata, sizes, random))
