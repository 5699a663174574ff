from pathlib import Path

import numpy as np
import pytest

from isic.runtime.errors import UserError
from tests.support.commands import TINY, Cli, tiny_settings
from tests.support.training import CPU, write_extra
from train.loaders import fold_loaders
from train.model import preprocess_spec
from train.rows import load_data
from train.sampling import (
    SUBSET_NEGATIVES,
    EpochSampler,
    HeldOutSampler,
    Key,
    Pool,
    RankSampler,
    create_pools,
    create_sampler,
    held_out_subset,
)


def test_negatives_depend_on_seed_and_epoch_only() -> None:
    rows, target = np.arange(200), (np.arange(200) % 10 == 0).astype(np.float32)
    pools = create_pools(rows, target, repeats=2, per_positive=3)

    def epoch(number: int) -> list[tuple[int, int]]:
        return list(EpochSampler(pools, seed=42, epoch=number))

    first, second = epoch(0), epoch(1)
    assert first == epoch(0)
    assert len(first) == len(EpochSampler(pools, 42)) == 2 * 20 + 60
    drawn = [row for row, _ in first]
    assert all(drawn.count(row) == 2 for row in range(0, 200, 10))
    negatives = {row for row in drawn if row % 10}
    assert len(negatives) == 60, "no negative twice"
    assert negatives != {row for row, _ in second if row % 10}


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "world_size"), [(100, 8, 2), (61, 4, 3), (10, 8, 2)]
)
def test_rank_batches_make_up_the_batches_of_one_process(
    num_rows: int, batch_size: int, world_size: int
) -> None:
    rows = np.arange(num_rows)
    pools = create_pools(rows, (rows % 3 == 0).astype(np.float32), repeats=1, per_positive=None)
    epoch = EpochSampler(pools, seed=42, epoch=3)
    whole = list(RankSampler(epoch, batch_size * world_size, 0, 1))
    by_rank = [list(RankSampler(epoch, batch_size, rank, world_size)) for rank in range(world_size)]
    assert [len(keys) for keys in by_rank] == [
        len(RankSampler(epoch, batch_size, r, world_size)) for r in range(world_size)
    ]
    for rank, keys in enumerate(by_rank):
        rows = RankSampler(EpochSampler(pools, seed=42), batch_size, rank, world_size).rows(3)
        assert rows.tolist() == [row for row, _ in keys], "of another epoch than the current one"
    drawn = [key for keys in by_rank for key in keys]
    assert sorted(drawn) == sorted(whole)
    assert len(set(drawn)) == len(drawn)
    for at in range(0, len(by_rank[0]), batch_size):
        batch = [key for keys in by_rank for key in keys[at : at + batch_size]]
        assert sorted(batch) == sorted(whole[at * world_size : (at + batch_size) * world_size])


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.5])
def test_extra_weight_scales_both_classes_of_an_epoch(weight: float) -> None:
    rows, target = np.arange(40), (np.arange(40) % 4 == 0).astype(np.float32)
    positives, negatives = create_pools(rows, target, repeats=2, per_positive=2, weight=weight)
    drawn = [row for row, _ in EpochSampler([positives, negatives], seed=1)]
    shown = [row for row in drawn if row % 4 == 0]
    assert len(shown) == round(2 * weight * 10)
    assert len(drawn) - len(shown) == round(weight * 20)
    counts = [shown.count(row) for row in range(0, 40, 4)]
    assert max(counts) - min(counts) <= 1, "each positive equally often, except for a remainder"


def test_every_extra_dataset_keeps_the_ratio_of_classes(
    small_dataset: Path, tmp_path: Path
) -> None:
    extras = [
        write_extra(tmp_path / "few", [1] * 2 + [0] * 50),
        write_extra(tmp_path / "many", [1] * 10 + [0] * 90),
    ]
    settings = tiny_settings(
        data=small_dataset,
        output_dir=tmp_path,
        extra_data=extras,
        negatives_per_positive=1.5,
        positive_repeats=2,
        extra_weight=2,
    )
    data = load_data(settings)
    sampler = fold_loaders(data, 0, preprocess_spec(settings), settings, CPU).sampler
    own = np.flatnonzero(data.fold > 0)
    epochs = []
    for sampler.epoch in (0, 1, 0):
        epochs.append(np.array([row for row, _ in sampler]))
        for number, num_positives in ((0, int(data.target[own].sum())), (1, 2), (2, 10)):
            rows = epochs[-1][data.source[epochs[-1]] == number]
            weight = 2 if number else 1
            assert (data.target[rows] == 1).sum() == 2 * weight * num_positives
            assert (data.target[rows] == 0).sum() == 1.5 * weight * num_positives
    assert np.array_equal(epochs[0], epochs[2])
    few = [set(rows[(data.source[rows] == 1) & (data.target[rows] == 0)]) for rows in epochs]
    assert len(few[0]) == 6
    assert few[0] != few[1], "sampled again each epoch"


def test_an_epoch_of_mostly_extra_rows_is_warned_of(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    extra = write_extra(tmp_path / "more", [1, 0] * 60)
    flags = [*TINY, "--data", small_dataset, "--epochs", 1, "--fold", 0, "--extra_data", extra]
    ended = cli("train", *flags, "--output_dir", tmp_path / "one")
    assert ended.code == 0, ended.err
    assert "fold 0: an epoch shows 16 positives and 32 negatives; of --extra_data" in ended.out
    assert "60 positives and 60 negatives (71%)" in ended.out
    warning = "warning: 71% of the rows of an epoch are of --extra_data; a lower --extra_weight"
    assert warning in ended.err
    ended = cli("train", *flags, "--output_dir", tmp_path / "two", "--extra_weight", 0.2)
    assert "12 positives and 12 negatives (33%)" in ended.out
    assert "warning" not in ended.err


def two_datasets() -> list[Pool]:
    """Return pools of 1,000 rows with 10 positives, and of 100 extra rows with 20."""
    rows = np.arange(1100)
    target = ((rows < 10) | (rows >= 1080)).astype(np.float32)
    own = create_pools(rows[:1000], target[:1000], repeats=3, per_positive=None)
    return [*own, *create_pools(rows[1000:], target[1000:], repeats=3, per_positive=None)]


def is_positive(key: Key) -> bool:
    return key[0] < 10 or key[0] >= 1080


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 32), (2, 16), (4, 8)])
@pytest.mark.parametrize("positives", [1, 5, 7])
def test_every_batch_of_every_process_has_its_positives(
    world_size: int, batch_size: int, positives: int
) -> None:
    settings = tiny_settings(batch_size=batch_size, positives_per_batch=positives)
    pools = two_datasets()
    epoch = create_sampler(pools, settings, 0, world_size)
    plain = EpochSampler(pools, settings.seed)
    for rank in range(world_size):
        sampler = RankSampler(epoch, batch_size, rank, world_size)
        keys = list(sampler)
        assert len(keys) == len(sampler) == len(RankSampler(plain, batch_size, rank, world_size))
        batches = [keys[at : at + batch_size] for at in range(0, len(keys), batch_size)]
        assert {sum(map(is_positive, batch)) for batch in batches} == {positives}
        places = {at for batch in batches for at, key in enumerate(batch) if is_positive(key)}
        assert len(places) > batch_size / 2, "anywhere in a batch"


def test_balanced_epochs_keep_the_proportions_of_datasets_and_repeat_rows_evenly() -> None:
    settings = tiny_settings(batch_size=32, positives_per_batch=8)
    epoch = create_sampler(two_datasets(), settings, 0, 1)
    drawn = np.array([row for row, _ in epoch])
    num_batches = (1000 + 20 + 100 + 40) // 32
    assert len(drawn) == len(epoch) == 32 * num_batches
    counts = np.bincount(drawn, minlength=1100)
    assert counts[:10].sum() + counts[1080:].sum() == 8 * num_batches
    assert counts[:10].sum() == round(8 * num_batches / 3), "10 of 30 positives"
    assert counts[10:1000].sum() == round(24 * num_batches * 990 / 1070)
    for part in (counts[:10], counts[1080:], counts[10:1000], counts[1000:1080]):
        assert part.max() - part.min() <= 1


def test_balanced_epochs_depend_on_seed_and_epoch_only() -> None:
    """Several processes take together the rows, augmented alike, of one with their batches."""
    epochs = {}
    for world_size in (1, 2):
        settings = tiny_settings(batch_size=32 // world_size, positives_per_batch=4 // world_size)
        sampler = create_sampler(two_datasets(), settings, 0, world_size)
        first = list(sampler)
        assert first == list(sampler)
        sampler.epoch = 1
        assert first != list(sampler)
        epochs[world_size] = first
    for at in range(0, len(epochs[1]), 32):
        assert sorted(epochs[1][at : at + 32]) == sorted(epochs[2][at : at + 32])


def test_batches_that_cannot_be_balanced_are_refused() -> None:
    settings = tiny_settings(batch_size=64, positives_per_batch=4)
    rows = np.arange(100)
    target = (rows < 10).astype(np.float32)
    pools = create_pools(rows, target, repeats=1, per_positive=5)
    with pytest.raises(UserError, match=r"fold 3: .*fewer than the 64 rows .*lower --batch_size"):
        create_sampler(pools, settings, 3, 1)
    pools = create_pools(rows, target, repeats=99, per_positive=0.01)
    with pytest.raises(UserError, match="shows 990 positives and 0 negatives, too few for"):
        create_sampler(pools, settings, 3, 1)


@pytest.mark.parametrize("ratio", [None, 2.0])
def test_extra_negatives_have_a_ratio_of_their_own(
    ratio: float | None, small_dataset: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(
        data=small_dataset,
        output_dir=tmp_path,
        extra_data=[write_extra(tmp_path / "many", [1] * 10 + [0] * 90)],
        extra_negatives_per_positive=3,
        negatives_per_positive=ratio,
    )
    data = load_data(settings)
    sampler = fold_loaders(data, 0, preprocess_spec(settings), settings, CPU).sampler
    drawn = np.array([row for row, _ in sampler])
    assert (data.target[drawn[data.source[drawn] == 1]] == 0).sum() == 30
    own = data.target[drawn[data.source[drawn] == 0]]
    assert (own == 0).sum() == (32 if ratio is None else ratio * (own == 1).sum())


def test_balanced_batches_train_and_are_reported(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--epochs", 1]
    ended = cli("train", *flags, "--batch_size", 8, "--positives_per_batch", 2)
    assert ended.code == 0, ended.err
    assert "fold 0: an epoch shows 12 positives and 36 negatives" in ended.out


def test_a_subset_of_the_held_out_rows_has_all_positives_and_is_fixed() -> None:
    rows = 3 * np.arange(5_000)
    target = (np.arange(5_000) % 100 == 7).astype(np.float32)
    subset = held_out_subset(rows, target, seed=1)
    assert len(subset) == 50 + SUBSET_NEGATIVES
    assert (np.diff(subset) > 0).all(), "each row once, in the order of the table"
    assert set(rows[target == 1]) <= set(subset) <= set(rows)
    assert np.array_equal(subset, held_out_subset(rows, target, seed=1))
    assert not np.array_equal(subset, held_out_subset(rows, target, seed=2))
    few = rows[:SUBSET_NEGATIVES]
    assert np.array_equal(held_out_subset(few, target[: len(few)], seed=1), few)


@pytest.mark.parametrize("world_size", [1, 3])
def test_processes_share_the_held_out_rows(world_size: int) -> None:
    rows, subset = np.arange(10, 30), np.arange(10, 30, 3)
    samplers = [HeldOutSampler(rows, subset, rank, world_size) for rank in range(world_size)]
    for takes_all, expected in ((True, rows), (False, subset)):
        shown: list[tuple[int, int]] = []
        for sampler in samplers:
            sampler.takes_all = takes_all
            assert len(list(sampler)) == len(sampler)
            shown += sampler
        assert sorted(row for row, _ in shown) == expected.tolist()
