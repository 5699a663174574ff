"""The ring of decoded batches, views of an image, and the progress."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.embedding.embedder import BatchStats, Embedder, EmbedJob
from infer.embedding.models import find_models
from infer.embedding.pipeline import decode_ahead, ring_depth
from infer.embedding.progress import Progress
from infer.embedding.shards import Shard, fold_of, run_missing_shards
from infer.embedding.views import VIEWS, apply_view, run_averaged
from infer.embedding.workers import core_slice
from infer.engines import PinnedAllocator, load
from infer.engines.null import NULL_FILE
from isic.folds import Folds
from isic.images import Hdf5Images, ImageStore, decode_pool
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.errors import UserError
from tests.support.datasets import jpeg, write_hdf5
from tests.support.fake_run import FakeRun, make_fake_run

SPEC = PreprocessSpec(size=16)
IDS = [f"ISIC_{row:03d}" for row in range(100)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Hdf5Images:
    path = tmp_path_factory.mktemp("images") / "train-image.hdf5"
    write_hdf5(path, {name: jpeg(16, row) for row, name in enumerate(IDS)})
    return Hdf5Images(path)


def batches(size: int) -> list[list[str]]:
    return [IDS[at : at + size] for at in range(0, len(IDS), size)]


@pytest.mark.parametrize(
    ("size", "depth", "num_threads"), [(1, 2, 3), (7, 3, 1), (33, 3, 2), (200, 2, 2)]
)
def test_batches_arrive_whole_and_in_order(
    store: ImageStore, size: int, depth: int, num_threads: int
) -> None:
    seen: list[str] = []
    with decode_pool(num_threads) as pool:
        for batch in decode_ahead(store, batches(size), SPEC, pool, size, depth):
            assert batch.images.shape == (len(batch.ids), 16, 16, 3) and not batch.failed
            expected = range(len(seen), len(seen) + len(batch.ids))
            np.testing.assert_array_equal(batch.images[:, 3, 3, 0], expected)
            seen += batch.ids
    assert seen == IDS


def test_memory_is_the_ring_and_nothing_is_decoded_further_ahead(store: ImageStore) -> None:
    taken, allocated = [], []

    def allocate(shape: tuple[int, int, int, int]) -> Pixels:
        allocated.append(shape)
        return np.empty(shape, np.uint8)

    def upcoming() -> Iterator[list[str]]:
        for batch in batches(5):
            taken.append(batch)
            yield batch

    with decode_pool(2) as pool:
        stream = decode_ahead(store, upcoming(), SPEC, pool, 5, 4, allocate)
        for number, _ in zip(range(3), stream, strict=False):
            assert len(taken) == number + 4
        stream.close()
    assert allocated == [(5, 16, 16, 3)] * 4


class Slow(Hdf5Images):
    """Counts reads; one of them fails in a way that is nobody's fault but the code's."""

    def __init__(self, path: Path, fails_at: int = -1) -> None:
        super().__init__(path)
        self.reads = 0
        self.fails_at = fails_at

    def read_ahead(self, positions: object) -> dict[int, bytes]:
        return {}

    def read_at(self, position: int) -> bytes:
        self.reads += 1
        time.sleep(0.005)
        if position == self.fails_at:
            raise RuntimeError("a bug")
        return super().read_at(position)


def test_an_error_in_a_thread_is_raised_in_its_turn(store: Hdf5Images) -> None:
    seen = 0
    with decode_pool(2) as pool, pytest.raises(RuntimeError, match="a bug"):
        for batch in decode_ahead(Slow(store.source, fails_at=57), batches(10), SPEC, pool, 10):
            seen += len(batch.ids)
    assert seen == 50


def test_leaving_early_drops_what_is_not_begun(store: Hdf5Images) -> None:
    slow = Slow(store.source)
    with decode_pool(1) as pool:
        stream = decode_ahead(slow, batches(10), SPEC, pool, 10, depth=8)
        next(stream)
        stream.close()
        reads = slow.reads
        assert reads <= 30, "eight batches were in the ring"
        time.sleep(0.05)
        assert slow.reads == reads, "nothing goes on"


def test_the_ring_keeps_the_threads_busy() -> None:
    assert ring_depth(256, 2) == 3
    assert ring_depth(16, 2) == 8
    assert ring_depth(256, 16) == 8


def test_views_are_groups_and_the_average_does_not_depend_on_which_view_is_shown() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    assert np.shares_memory(apply_view(images, 0, False), images)
    np.testing.assert_array_equal(apply_view(images, 1, False)[0], np.rot90(images[0]))
    np.testing.assert_array_equal(apply_view(images, 2, True)[0], np.flipud(images[0]))
    for name, views in VIEWS.items():
        seen = {apply_view(images, *one).tobytes() for one in views}
        assert len(seen) == len(views)
        for one in views:
            assert {
                apply_view(apply_view(images, *one), *other).tobytes() for other in views
            } == seen, name


def test_an_average_is_made_in_float32(tmp_path: Path) -> None:
    fake_run = make_fake_run(tmp_path, num_images=12)
    engines = {fold: load(fake_run.model_dir / f"fold_{fold}" / NULL_FILE) for fold in (0, 2)}
    assert not isinstance(engines[0], PinnedAllocator)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    plain, all_views = run_averaged(engines, images, "none"), run_averaged(engines, images, "d4")
    for fold, engine in engines.items():
        np.testing.assert_array_equal(plain[fold][0], engine.run(images)[0])
        expected = np.mean([engine.run(apply_view(images, *one))[0] for one in VIEWS["d4"]], axis=0)
        np.testing.assert_allclose(all_views[fold][0], expected, rtol=1e-6)
        assert all_views[fold][0].dtype == all_views[fold][1].dtype == np.float32
    np.testing.assert_allclose(all_views[2][1] - all_views[0][1], 2, atol=1e-6)


def shard(folder: Path, number: int, num_ids: int = 10, bad: int = 0) -> Shard:
    """A shard that is done, with some bad images."""
    ids = pl.Series([f"{number}-{row}" for row in range(num_ids)])
    shard = Shard(ids, {0: folder / f"part-{number:05d}.parquet"})
    shard.paths[0].touch()
    if bad:
        pl.DataFrame({"isic_id": ids[:bad], "reason": ["truncated JPEG"] * bad}).write_parquet(
            shard.errors_path
        )
    return shard


def test_bad_images_are_counted_against_the_whole_run(tmp_path: Path) -> None:
    done, due = shard(tmp_path, 0, bad=1), [shard(tmp_path, number) for number in (1, 2, 3)]
    for one in due:
        one.paths[0].unlink()
    progress = Progress([done, *due], "skip", 0.05, quiet=True)
    assert (progress.num_images, progress.num_due) == (10, 30)
    progress.add(BatchStats(10, [("1-0", "zero bytes")], decode_wait=1.0, engine=3.0))
    assert progress.bound_by == "engine" and progress.time_shares == {
        "decode": 0.25,
        "engine": 0.75,
        "write": 0.0,
    }
    with pytest.raises(
        UserError,
        match=r"3 of the first 30 images cannot be used \(2 zero bytes, 1 truncated JPEG\)",
    ):
        progress.add(BatchStats(10, [("2-0", "zero bytes")]))
    with pytest.raises(UserError, match="0-0: truncated JPEG; fix it"):
        Progress([done, *due], "raise", 1.0, quiet=True)


def test_rounds_end_when_all_is_there_or_nothing_gets_on(tmp_path: Path) -> None:
    shards = [shard(tmp_path, number) for number in range(4)]
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


def test_an_engine_that_overflows_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_run = make_fake_run(tmp_path, num_images=12)
    monkeypatch.setattr(
        "infer.engines.null.NullEngine.run",
        lambda self, images: (
            np.full((len(images), 8), 1e5, np.float32),
            np.zeros((len(images), 1), np.float32),
        ),
    )
    job = make_job(fake_run)
    one = Shard(pl.Series(["ISIC_0000003"]), {1: tmp_path / "fold_1" / "part-00000.parquet"})
    says = pytest.raises(
        UserError,
        match=r"the engine of fold 1 returns values for ISIC_0000003 .* not finite as float16",
    )
    with says, np.errstate(over="ignore"), Embedder(job) as embedder:
        embedder.run([one], lambda step: None)
    assert not one.is_done


def make_job(fake_run: FakeRun) -> EmbedJob:
    models = find_models(fake_run.model_dir, "null", NULL_FILE)
    return EmbedJob(fake_run.data, "train", models, "cpu", "float16", "none", 4, 2, None)


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

    with pytest.raises(KeyboardInterrupt), Embedder(make_job(fake_run)) as embedder:
        embedder.run(shards, stop)
    assert threading.active_count() == before
    assert shards[0].is_done and not shards[5].is_done and not list(tmp_path.glob(".*.tmp"))


def test_cores_are_shared_out() -> None:
    assert [core_slice([4, 5, 6, 7], index, 2) for index in range(2)] == [[4, 5], [6, 7]]
    assert [core_slice([0, 1], index, 3) for index in range(3)] == [[0], [1], [0]]
