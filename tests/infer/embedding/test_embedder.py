import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.embedding.embedder import BatchStats, Embedder
from infer.embedding.shards import Shard
from infer.engines import Outputs
from infer.engines.null import NullEngine
from isic.preprocess import Pixels
from isic.runtime.errors import UserError
from tests.support.fake_run import make_fake_run, null_job


def test_an_engine_that_overflows_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_run = make_fake_run(tmp_path, num_images=12)

    def overflow(self: NullEngine, images: Pixels) -> Outputs:
        features = np.full((len(images), 8), 1e5, np.float32)
        return features, np.zeros((len(images), 1), np.float32)

    monkeypatch.setattr(NullEngine, "run", overflow)
    shard = Shard(pl.Series(["ISIC_0000003"]), {1: tmp_path / "fold_1" / "part-00000.parquet"})
    message = r"the engine of fold 1 returns values for ISIC_0000003 .* not finite as float16"
    with (
        np.errstate(over="ignore"),
        Embedder(null_job(fake_run)) as embedder,
        pytest.raises(UserError, match=message),
    ):
        embedder.run([shard], lambda stats: None)
    assert not shard.is_done


def test_an_exception_of_the_callback_ends_the_run_and_its_threads(tmp_path: Path) -> None:
    fake_run = make_fake_run(tmp_path, num_images=60, images_per_second=500)
    ids = pl.Series([f"ISIC_{row:07d}" for row in range(60)])
    shards = [
        Shard(ids.slice(at, 10), {0: tmp_path / f"part-{at:05d}.parquet"})
        for at in range(0, 60, 10)
    ]
    before = threading.active_count()

    def stop(stats: BatchStats) -> None:
        if shards[1].is_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Embedder(null_job(fake_run)) as embedder:
        embedder.run(shards, stop)
    assert threading.active_count() == before
    assert shards[0].is_done
    assert not shards[5].is_done
    assert not list(tmp_path.glob(".*.tmp"))
