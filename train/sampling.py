"""Which rows an epoch trains and validates on, in which order, and the augmentation's seeds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from isic.layout import Fold
from isic.runtime.errors import UserError, warn
from train.config import TrainSettings
from train.rows import TrainData

Key = tuple[int, int]
"""A row number and the seed of its augmentation."""
# More would cost time and make a curve hardly more precise, as a fold of the challenge has few
# positives. On normal scores with a pAUC of 0.145, drawing 500 of 80,000 negatives shifts it by
# 0.003 (standard deviation), and drawing 79 positives by 0.010.
SUBSET_NEGATIVES = 500
"""Held-out negatives, next to all positives, in a validation that is not on all rows."""


@dataclass(frozen=True)
class Pool:
    """Rows of one dataset and one class, and the number of them that an epoch shows."""

    rows: NDArray[np.int64]
    num_samples: int

    def sample(self, random: np.random.Generator) -> NDArray[np.int64]:
        """Return `num_samples` rows: all equally often, the remainder without replacement."""
        if not self.num_samples:
            return self.rows[:0]
        repeats, remainder = divmod(self.num_samples, len(self.rows))
        rest = random.choice(self.rows, remainder, replace=False)
        return np.concatenate([np.tile(self.rows, repeats), rest])


def create_pools(
    rows: NDArray[np.int64],
    target: NDArray[np.float32],
    repeats: int,
    per_positive: float | None,
    weight: float = 1.0,
) -> tuple[Pool, Pool]:
    """Return the positives and the negatives of a dataset.

    Args:
        rows: [N], row numbers.
        target: [N], 0 or 1.
        repeats: times that each positive is shown.
        per_positive: negatives per positive, None for all.
        weight: factor of both numbers.
    """
    positives = rows[target == 1]
    negatives = rows[target == 0]
    num_negatives = len(negatives)
    if per_positive is not None:
        num_negatives = min(round(per_positive * len(positives)), len(negatives))
    return (
        Pool(positives, round(weight * repeats * len(positives))),
        Pool(negatives, round(weight * num_negatives)),
    )


def epoch_pools(
    data: TrainData,
    training: NDArray[np.int64],
    settings: TrainSettings,
) -> list[Pool]:
    """Return positives and negatives of the training rows, then those of each extra dataset."""
    repeats = settings.positive_repeats
    ratio = settings.negatives_per_positive
    pools = list(create_pools(training, data.target[training], repeats, ratio))
    for number in range(1, len(data.metadata_paths)):
        rows = np.flatnonzero(data.source == number)
        # By default each dataset has the same ratio of classes. With the negatives of one and the
        # positives of another, the network would learn to recognise datasets.
        pools += create_pools(
            rows, data.target[rows], repeats, settings.extra_ratio, settings.extra_weight
        )
    return pools


def create_sampler(
    pools: Sequence[Pool], settings: TrainSettings, fold: Fold, world_size: int
) -> "EpochSampler":
    """Return the sampler of a fold's epochs.

    Args:
        pools: positives and negatives by turns.

    Raises:
        UserError: batches cannot be balanced: an epoch has no full one, or no row of a class.
    """
    if settings.positives_per_batch is None:
        return EpochSampler(pools, settings.seed)
    num_shown = [sum(pool.num_samples for pool in pools[first::2]) for first in (0, 1)]
    if not all(num_shown):
        raise UserError(
            f"fold {fold}: an epoch shows {num_shown[0]} positives and {num_shown[1]} negatives, "
            "too few for --positives_per_batch; raise --negatives_per_positive or --extra_weight"
        )
    batch_size = settings.batch_size * world_size
    num_batches = sum(num_shown) // batch_size
    if not num_batches:
        raise UserError(
            f"fold {fold}: an epoch has fewer than the {batch_size} rows of a batch, which "
            "--positives_per_batch could balance; lower --batch_size"
        )
    positives = settings.positives_per_batch * world_size
    counts = (num_batches * positives, num_batches * (batch_size - positives))
    balanced = list(pools)
    for first, count in enumerate(counts):
        balanced[first::2] = share(pools[first::2], count)
    return BalancedSampler(balanced, settings.seed, world_size, num_batches)


def share(pools: Sequence[Pool], num_samples: int) -> list[Pool]:
    """Return the pools with another total of samples, in the same proportions."""
    before = np.cumsum([0, *(pool.num_samples for pool in pools)])
    after = np.round(before * num_samples / before[-1]).astype(int)
    counts = np.diff(after).tolist()
    return [replace(pool, num_samples=count) for pool, count in zip(pools, counts, strict=True)]


def report_composition(pools: Sequence[Pool], fold: Fold) -> None:
    """Print how many rows of each class an epoch shows; warn if most are of extra datasets."""
    positives = pools[0].num_samples
    negatives = pools[1].num_samples
    text = f"{positives} positives and {negatives} negatives"
    extra_positives = sum(pool.num_samples for pool in pools[2::2])
    extra_negatives = sum(pool.num_samples for pool in pools[3::2])
    num_extra = extra_positives + extra_negatives
    fraction = num_extra / (positives + negatives + num_extra)
    if len(pools) > 2:
        text += (
            f"; of --extra_data {extra_positives} positives and {extra_negatives} negatives "
            f"({fraction:.0%})"
        )
    print(f"fold {fold}: an epoch shows {text}", flush=True)
    if fraction > 0.5:
        warn(
            f"{fraction:.0%} of the rows of an epoch are of --extra_data; "
            "a lower --extra_weight or --extra_negatives_per_positive shows fewer"
        )


class EpochSampler(Sampler[Key]):
    """Samples an epoch's rows from pools and shuffles them.

    The keys depend on the seed and the epoch only, so that a resumed run repeats them.
    """

    def __init__(self, pools: Sequence[Pool], seed: int, epoch: int = 0) -> None:
        self.pools = pools
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(pool.num_samples for pool in self.pools)

    def __iter__(self) -> Iterator[Key]:
        rows, seeds = self.draw(self.epoch)
        return iter(zip(rows.tolist(), seeds.tolist(), strict=True))

    def draw(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows of an epoch and the seeds of their augmentation."""
        random = np.random.default_rng((self.seed, epoch))
        sampled = [pool.sample(random) for pool in self.pools]
        rows = random.permutation(np.concatenate(sampled))
        return rows, random.integers(2**31, size=len(rows))


class BalancedSampler(EpochSampler):
    """Samples an epoch in which each batch of each process has the same number of positives.

    Batches of several processes make up those of one process with as many positives.
    """

    def __init__(
        self, pools: Sequence[Pool], seed: int, world_size: int, num_batches: int, epoch: int = 0
    ) -> None:
        """Take pools of positives and negatives by turns that fill the batches.

        Args:
            num_batches: of each process.
        """
        super().__init__(pools, seed, epoch)
        self.world_size = world_size
        self.num_batches = num_batches

    def draw(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows of an epoch and the seeds of their augmentation."""
        random = np.random.default_rng((self.seed, epoch))
        classes = [
            random.permutation(np.concatenate([pool.sample(random) for pool in pools]))
            for pools in (self.pools[::2], self.pools[1::2])
        ]
        rows = np.concatenate(classes)
        seeds = random.integers(2**31, size=len(rows))
        # Processes take keys by turns, hence the last axis.
        shape = (self.num_batches, -1, self.world_size)
        positives, negatives = np.split(np.arange(len(rows)), [len(classes[0])])
        batches = np.concatenate([positives.reshape(shape), negatives.reshape(shape)], axis=1)
        order = random.permuted(batches, axis=1).ravel()
        return rows[order], seeds[order]


class RankSampler(Sampler[Key]):
    """One process's keys of an epoch, interleaved with those of the other processes.

    The batches of all processes make up the batch that a single process would take.
    """

    def __init__(self, epoch: EpochSampler, batch_size: int, rank: int, world_size: int) -> None:
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size
        # An incomplete last batch is dropped unless it is the only one: its few rows would weigh
        # as much as those of a full one.
        incomplete = len(epoch) % (batch_size * world_size)
        self.num_keys = len(epoch) - incomplete or len(epoch)

    def __len__(self) -> int:
        return len(range(self.rank, self.num_keys, self.world_size))

    def __iter__(self) -> Iterator[Key]:
        return islice(iter(self.epoch), self.rank, self.num_keys, self.world_size)

    def rows(self, epoch: int) -> NDArray[np.int64]:
        """Return the rows of any epoch, of which `__iter__` gives those of the current one."""
        rows, _ = self.epoch.draw(epoch)
        return rows[self.rank : self.num_keys : self.world_size]


def held_out_subset(
    rows: NDArray[np.int64], target: NDArray[np.float32], seed: int
) -> NDArray[np.int64]:
    """Return all positives and at most SUBSET_NEGATIVES negatives, in the rows' order.

    Args:
        rows: [N], row numbers.
        target: [N], 0 or 1.
    """
    negatives = np.flatnonzero(target == 0)
    if len(negatives) <= SUBSET_NEGATIVES:
        return rows
    random = np.random.default_rng(seed)
    chosen = random.choice(negatives, SUBSET_NEGATIVES, replace=False)
    is_chosen = np.zeros(len(rows), bool)
    is_chosen[target == 1] = True
    is_chosen[chosen] = True
    return rows[is_chosen]


class HeldOutSampler(Sampler[Key]):
    """One process's part of the held-out rows, or of a subset of them, each row once, in order."""

    def __init__(
        self, rows: NDArray[np.int64], subset: NDArray[np.int64], rank: int, world_size: int
    ) -> None:
        self.num_rows = len(rows)
        # Split without padding, so that each held-out row is predicted exactly once.
        self.all = rows[rank::world_size]
        self.subset = subset[rank::world_size]
        self.takes_all = True
        """To be set before each validation."""

    def rows(self, takes_all: bool) -> NDArray[np.int64]:
        return self.all if takes_all else self.subset

    def __len__(self) -> int:
        return len(self.rows(self.takes_all))

    def __iter__(self) -> Iterator[Key]:
        return iter((int(row), 0) for row in self.rows(self.takes_all))
