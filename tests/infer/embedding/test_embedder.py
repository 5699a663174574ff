import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.embedding.embedder import BatchStats, Embedder
from infer.embedding.shards import Shard
from isic.runtime.errors import UserError
from tests.support.fake_run import make_fake_run, null_job


def test_an_engine_that_overflows_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_run = make_fake_run(tmp_path, num_images=12)
    monkeypatch.setattr(
        "infer.engines.null.NullEngine.run",
        lambda self, images: (
            np.full((len(images), 8), 1e5, np.float32),
            np.zeros((len(images), 1), np.float32),
        ),
    )
    job = null_job(fake_run)
    one = Shard(pl.Series(["ISIC_0000003"]), {1: tmp_path / "fold_1" / "part-00000.parquet"})
    says = pytest.raises(
        UserError,
        match=r"the engine of fold 1 returns values for ISIC_0000003 .* not finite as float16",
    )
    with says, np.errstate(over="ignore"), Embedder(job) as embedder:
        embedder.run([one], lambda step: None)
    assert not one.is_done


def test_what_the_listener_raises_ends_the_run_and_its_threads(tmp_path: Path) -> None:
    fake_run = make_fake_run(tmp_path, num_images=60, images_per_second=500)
    ids = pl.Series([f"ISIC_{row:07d}" for row in range(60)])
    shards = [
        Shard(ids.slice(at, 10), {0: tmp_path / f"part-{at:05d}.parquet"})
        for at in range(0, 60, 10)
    ]
    before = threading.active_count()

    def stop(step: BatchStats) -> None:
        if shards[1].is_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Embedder(null_job(fake_run)) as embedder:
        embedder.run(shards, stop)
    assert threading.active_count() == before
    assert shards[0].is_done and not shards[5].is_done and not list(tmp_path.glob(".*.tmp"))
