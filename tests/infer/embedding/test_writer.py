from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest

from infer.embedding.shards import Shard
from infer.embedding.store import read_run, scan_embeddings
from infer.embedding.writer import Computed, ShardWriter, mean_of_views
from infer.engines import Outputs
from infer.engines.null import write_run
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.errors import UserError
from isic.tables import read_parquet
from tests.support.fake_run import FakeRun

IDS = ["A", "B", "C", "D"]


def outputs(start: int, number: int, dtype: type = np.float32) -> Outputs:
    """Return features [number, 2] and logits [number, 1] that count up from `start`."""
    values = np.arange(start, start + number)[:, None]
    return np.repeat(values, 2, axis=1).astype(dtype), values.astype(np.float32)


def test_batches_become_shards_without_the_bad_images(tmp_path: Path) -> None:
    shards = [
        Shard(
            pl.Series(IDS), {0: tmp_path / "a" / "part-0.parquet", 1: tmp_path / "part-1.parquet"}
        ),
        Shard(pl.Series(["E"]), {1: tmp_path / "part-2.parquet"}),
    ]
    with ShardWriter("float16", "digest") as writer:
        writer.add(
            shards[0], Computed(IDS[:3], {1: "damaged"}, {0: outputs(0, 3), 1: outputs(10, 3)})
        )
        writer.add(shards[0], Computed(IDS[3:], {}, {0: outputs(3, 1), 1: outputs(13, 1)}))
        writer.add(shards[1], Computed(["E"], {}, {1: outputs(20, 1, np.float16)}))
        writer.finish()
    for shard, fold, start in ((shards[0], 0, 0), (shards[0], 1, 10)):
        table = read_parquet(shard.paths[fold])
        assert table["isic_id"].to_list() == ["A", "C", "D"]
        assert table["logit"].to_list() == [start, start + 2, start + 3]
        assert table["features"].dtype == pl.Array(pl.Float16, 2)
    assert shards[0].read_bad() == [("B", "damaged")]
    assert read_parquet(shards[1].paths[1])["features"].to_list() == [[20, 20]]


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    """Also one that a float32 engine gives and float16 cannot hold; bad images do not count."""
    shard = Shard(pl.Series(IDS), {3: tmp_path / "part-0.parquet"})
    for place, value in ((0, 1e5), (0, np.nan), (1, np.inf)):
        results = outputs(0, 4)
        results[place][2] = value
        with ShardWriter("float16", None) as writer:
            writer.add(shard, Computed(IDS, {}, {3: results}))
            with pytest.raises(UserError, match=r"fold 3 returns values for C .* not finite"):
                writer.finish()
        assert not shard.is_done
    with ShardWriter("float16", None) as writer:
        writer.add(shard, Computed(IDS, {2: "damaged"}, {3: results}))
        writer.finish()
    assert shard.is_done


def with_aux(start: int, number: int, num_views: int = 1) -> Outputs:
    """Return outputs with two auxiliary logits, which differ by view."""
    views = [outputs(start + view, number) for view in range(num_views)]
    features, logits = (np.concatenate(parts) for parts in zip(*views, strict=True))
    return features, logits, np.concatenate([100 * logits, -logits], axis=1)


def test_auxiliary_logits_are_columns(tmp_path: Path) -> None:
    """They are averaged over views and cut like the logits; features may be in half precision."""
    shard = Shard(pl.Series(IDS), {k: tmp_path / f"{k}" / "part-0.parquet" for k in (0, 1)})
    with ShardWriter("float16", "digest", ("mel", "seen")) as writer:
        first = {0: with_aux(0, 3, num_views=2), 1: with_aux(10, 3, num_views=2)}
        writer.add(shard, Computed(IDS[:3], {1: "damaged"}, first))
        writer.add(shard, Computed(IDS[3:], {}, {0: with_aux(3, 1), 1: with_aux(13, 1)}))
        writer.finish()
    for fold, start in ((0, 0), (1, 10)):
        table = read_parquet(shard.paths[fold])
        expected = [start + 0.5, start + 2.5, start + 3]
        assert table.columns == ["isic_id", "features", "logit", "aux.mel", "aux.seen"]
        assert table["logit"].to_list() == expected
        assert table["aux.mel"].to_list() == [100 * value for value in expected]
        assert table["aux.seen"].to_list() == [-value for value in expected]
        assert table.schema["aux.seen"] == pl.Float32


def test_an_auxiliary_logit_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    shard = Shard(pl.Series(IDS), {3: tmp_path / "part-0.parquet"})
    results = with_aux(0, 4)
    results[2][2, 1] = np.nan
    with ShardWriter("float16", None, ("mel", "seen")) as writer:
        writer.add(shard, Computed(IDS, {}, {3: results}))
        with pytest.raises(UserError, match=r"fold 3 returns values for C .* not finite"):
            writer.finish()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_views_are_averaged_in_float32(dtype: type) -> None:
    values = np.random.default_rng(0).normal(size=(8 * 3, 5)).astype(dtype)
    expected = np.zeros((3, 5), np.float32)
    for view in range(8):
        expected += values[3 * view : 3 * view + 3]
    mean = mean_of_views(values, num_images=3)
    np.testing.assert_array_equal(mean, expected / 8)
    assert mean.dtype == np.float32
    assert mean_of_views(values, num_images=24) is values


SIZE = 16


def random_image(number: int) -> Pixels:
    """Return the RGB image of a number, uint8 [SIZE, SIZE, 3]."""
    return np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def test_test_time_augmentation_uses_every_view(tmp_path: Path) -> None:
    """The null engine's features are the first pixel, so an average is one of corner pixels."""
    folder = tmp_path / "data" / "train-image"
    folder.mkdir(parents=True)
    ids = [f"ISIC_{row}" for row in range(12)]
    for row, name in enumerate(ids):
        png = cv2.imencode(".png", random_image(row)[..., ::-1])[1]
        (folder / f"{name}.jpg").write_bytes(png.tobytes())
    metadata = tmp_path / "data" / "train-metadata.csv"
    pl.DataFrame({"isic_id": ids, "target": [row % 2 for row in range(12)]}).write_csv(metadata)
    write_run(tmp_path / "null", metadata, PreprocessSpec(size=SIZE), 2, 3)
    fake_run = FakeRun(tmp_path / "data", tmp_path / "null")
    for tta, num_corners in (("none", 1), ("flips", 4), ("d4", 4)):
        ended = fake_run.run(tmp_path / tta, "--tta", tta, "--dtype", "float32")
        assert ended.returncode == 0, ended.stderr
        table = scan_embeddings(tmp_path / tta / "null", "train", ["features"]).collect()
        for name, features in table.select("isic_id", "features").iter_rows():
            image = random_image(int(name.removeprefix("ISIC_"))) / 255
            corners = [image[0, 0], image[0, -1], image[-1, 0], image[-1, -1]]
            np.testing.assert_allclose(features, np.mean(corners[:num_corners], axis=0), atol=1e-6)
    assert read_run(tmp_path / "d4" / "null", "train")["tta"] == "d4"
