from pathlib import Path

import numpy as np
import polars as pl

from infer.embedding.store import read_run, scan_embeddings
from infer.embedding.views import VIEWS, apply_view, run_averaged
from infer.engines import PinsMemory, load
from infer.engines.null import FILE, write_run
from isic.preprocess import PreprocessSpec
from tests.support.fake_run import FakeRun, make_fake_run


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
    engines = {fold: load(fake_run.model_dir / f"fold_{fold}" / FILE) for fold in (0, 2)}
    assert not isinstance(engines[0], PinsMemory)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    plain, all_views = run_averaged(engines, images, "none"), run_averaged(engines, images, "d4")
    for fold, engine in engines.items():
        np.testing.assert_array_equal(plain[fold][0], engine.run(images)[0])
        expected = np.mean([engine.run(apply_view(images, *one))[0] for one in VIEWS["d4"]], axis=0)
        np.testing.assert_allclose(all_views[fold][0], expected, rtol=1e-6)
        assert all_views[fold][0].dtype == all_views[fold][1].dtype == np.float32
    np.testing.assert_allclose(all_views[2][1] - all_views[0][1], 2, atol=1e-6)


def test_test_time_augmentation_sees_every_view(tmp_path: Path) -> None:
    """Features are the first pixels, so the average over the views must be that of the corners' pixels."""
    data = tmp_path / "data" / "train-image"
    data.mkdir(parents=True)
    import cv2

    for row in range(12):
        image = np.random.default_rng(row).integers(0, 256, (16, 16, 3), np.uint8)
        (data / f"ISIC_{row}.jpg").write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
    table = pl.DataFrame(
        {"isic_id": [f"ISIC_{row}" for row in range(12)], "target": [row % 2 for row in range(12)]}
    )
    table.write_csv(tmp_path / "data" / "train-metadata.csv")
    write_run(
        tmp_path / "null", tmp_path / "data" / "train-metadata.csv", PreprocessSpec(size=16), 2, 3
    )
    for tta, corners in (("none", 1), ("flips", 4), ("d4", 4)):
        fake_run = FakeRun(tmp_path / "data", tmp_path / "null")
        ended = fake_run.run(tmp_path / tta, "--tta", tta, "--dtype", "float32")
        assert ended.returncode == 0, ended.stderr
        for name, features in (
            scan_embeddings(tmp_path / tta / "null", "train", ["features"])
            .select("isic_id", "features")
            .collect()
            .iter_rows()
        ):
            image = (
                np.random.default_rng(int(name[5:])).integers(0, 256, (16, 16, 3), np.uint8) / 255
            )
            mean = np.mean(
                [image[0, 0], image[0, 15], image[15, 0], image[15, 15]][:corners], axis=0
            )
            np.testing.assert_allclose(features, mean, atol=1e-6)
    assert read_run(tmp_path / "d4" / "null", "train")["tta"] == "d4"
