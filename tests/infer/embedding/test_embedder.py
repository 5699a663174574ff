import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from infer.embedding.embedder import BatchStats, Embedder
from infer.embedding.shards import Shard
from infer.engines import IN_FLIGHT
from infer.engines.null import NullEngine, NullPending
from isic.dataset import Dataset
from isic.preprocess import Pixels
from isic.runtime.errors import UserError
from tests.support.fake_run import make_fake_run, null_job


def small_shards(folder: Path) -> list[Shard]:
    ids = pl.Series([f"ISIC_{row:07d}" for row in range(60)])
    return [
        Shard(ids.slice(at, 10), {0: folder / f"part-{at:05d}.parquet"}) for at in range(0, 60, 10)
    ]


class FailingEngine(NullEngine):
    """Its third batch fails when its result is asked for; all are counted."""

    def __init__(self) -> None:
        super().__init__([0], 8, None)
        self.submitted: list[NullPending] = []

    def submit(self, images: Pixels, folds: Iterable[int] | None = None) -> NullPending:
        pending = super().submit(images, folds)
        pending.result = partial(self._result, len(self.submitted), pending.result)  # type: ignore[method-assign]
        self.submitted.append(pending)
        return pending

    def _result(self, number: int, result: Callable[[], Any]) -> Any:
        self.submitted[number].is_collected = True  # type: ignore[attr-defined]
        if number >= 2:
            raise UserError(f"batch {number} failed")
        return result()

    def close(self) -> None:
        assert all(hasattr(pending, "is_collected") for pending in self.submitted)


def test_an_engine_that_fails_leaves_nothing_in_flight(tmp_path: Path) -> None:
    fake_run = make_fake_run(tmp_path, num_images=60)
    shards = small_shards(tmp_path)
    job, engine = null_job(fake_run), FailingEngine()
    with Embedder(job, engine, Dataset(job.data).images("train")) as embedder:
        with pytest.raises(UserError, match="batch 2 failed"):
            embedder.run(shards, lambda stats: None)
        assert len(engine.submitted) == 2 + IN_FLIGHT
    assert not any(shard.is_done for shard in shards)
    assert not list(tmp_path.glob(".*.tmp"))


class RecordingEngine(NullEngine):
    """Records the largest number of batches that were in flight."""

    def __init__(self) -> None:
        super().__init__([0], 8, None)
        self.now, self.most = 0, 0

    def submit(self, images: Pixels, folds: Iterable[int] | None = None) -> NullPending:
        pending = super().submit(images, folds)
        self.now += 1
        self.most = max(self.most, self.now)
        pending.result = partial(self._result, pending.result)  # type: ignore[method-assign]
        return pending

    def _result(self, result: Callable[[], Any]) -> Any:
        self.now -= 1
        return result()


def test_views_take_no_more_memory_than_images(tmp_path: Path) -> None:
    job = null_job(make_fake_run(tmp_path, num_images=60))
    sizes = []
    for tta in ("none", "d4"):
        job = replace(job, tta=tta, batch_size=256, num_threads=16)
        with Embedder(job, FailingEngine(), Dataset(job.data).images("train")) as embedder:
            sizes.append(embedder._slots.nbytes)
    assert sizes[1] <= sizes[0]


def test_the_engine_always_has_the_next_batches(tmp_path: Path) -> None:
    fake_run = make_fake_run(tmp_path, num_images=60)
    job, engine = null_job(fake_run), RecordingEngine()
    with Embedder(job, engine, Dataset(job.data).images("train")) as embedder:
        embedder.run(small_shards(tmp_path), lambda stats: None)
    assert engine.most == IN_FLIGHT
    assert engine.now == 0


def test_an_exception_of_the_callback_ends_the_run_and_its_threads(tmp_path: Path) -> None:
    fake_run = make_fake_run(tmp_path, num_images=60, images_per_second=500)
    shards = small_shards(tmp_path)
    before = threading.active_count()

    def stop(stats: BatchStats) -> None:
        if shards[1].is_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Embedder.open(null_job(fake_run)) as embedder:
        embedder.run(shards, stop)
    assert threading.active_count() == before
    assert shards[0].is_done
    assert not shards[5].is_done
    assert not list(tmp_path.glob(".*.tmp"))
