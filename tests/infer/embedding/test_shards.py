from pathlib import Path

import polars as pl
import pytest

from infer.embedding.shards import Shard, fold_of, run_missing_shards
from isic.folds import Folds
from isic.runtime.errors import UserError
from tests.support.fake_run import finished_shard


def test_rounds_end_when_all_is_there_or_nothing_gets_on(tmp_path: Path) -> None:
    shards = [finished_shard(tmp_path, number) for number in range(4)]
    for one in shards[1:]:
        one.paths[0].unlink()
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
    plan = Folds(
        pl.DataFrame(
            {"isic_id": ["A", "B", "C", "D"], "fold": pl.Series([2, 0, 1, 0], dtype=pl.Int8)}
        )
    )
    unsorted = Folds(plan.table.reverse())
    for folds in (plan, unsorted):
        assert fold_of(ids, folds).to_list() == folds.of(ids.to_frame()).to_list() == [0, 2, 0, 1]
    with pytest.raises(UserError, match="lacks 1 rows of this dataset, the first is E"):
        fold_of(pl.Series("isic_id", ["A", "E"]), plan)
