from pathlib import Path

import polars as pl
import pytest

from infer.embedding.shards import Shard, fold_of, run_missing_shards
from isic.folds import Folds
from isic.runtime.errors import UserError
from tests.support.fake_run import finished_shard


def test_shards_are_run_until_all_are_done_or_a_round_fails(tmp_path: Path) -> None:
    shards = [finished_shard(tmp_path, number) for number in range(4)]
    for shard in shards[1:]:
        shard.paths[0].unlink()
    rounds: list[int] = []

    def loses_all_but_one(due: list[Shard]) -> None:
        rounds.append(len(due))
        due[-1].paths[0].touch()

    run_missing_shards(shards, loses_all_but_one)
    assert rounds == [3, 2, 1]
    shards[0].paths[0].unlink()
    with pytest.raises(UserError, match="before it finished one of 1 shards"):
        run_missing_shards(shards, lambda due: None)


def test_folds_by_search_are_those_by_join() -> None:
    ids = pl.Series("isic_id", ["B", "A", "D", "C"])
    fold = pl.Series([2, 0, 1, 0], dtype=pl.Int8)
    in_order = Folds(pl.DataFrame({"isic_id": ["A", "B", "C", "D"], "fold": fold}))
    unsorted = Folds(in_order.table.reverse())
    for folds in (in_order, unsorted):
        assert fold_of(ids, folds).to_list() == [0, 2, 0, 1]
        assert folds.of(ids.to_frame()).to_list() == [0, 2, 0, 1]
    with pytest.raises(UserError, match="lacks 1 rows of this dataset, the first is E"):
        fold_of(pl.Series("isic_id", ["A", "E"]), in_order)
