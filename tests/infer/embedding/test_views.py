from pathlib import Path

import cv2
import numpy as np
import polars as pl

from infer.embedding.store import read_run, scan_embeddings
from infer.embedding.views import apply_view, run_averaged
from infer.engines import Outputs, PinnedAllocator, load
from infer.engines.null import NULL_FILE, write_run
from isic.preprocess import Pixels, PreprocessSpec
from isic.views import VIEWS
from tests.support.fake_run import FakeRun, make_fake_run


def test_outputs_are_averaged_in_float32(tmp_path: Path) -> None:
    fake_run = make_fake_run(tmp_path, num_images=12)
    engines = {fold: load(fake_run.model_dir / f"fold_{fold}" / NULL_FILE) for fold in (0, 2)}
    assert not isinstance(engines[0], PinnedAllocator)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    plain = run_averaged(engines, images, "none")
    all_views = run_averaged(engines, images, "d4")
    for fold, engine in engines.items():
        np.testing.assert_array_equal(plain[fold][0], engine.run(images)[0])
        expected = np.mean([engine.run(apply_view(images, *one))[0] for one in VIEWS["d4"]], axis=0)
        np.testing.assert_allclose(all_views[fold][0], expected, rtol=1e-6)
        assert all_views[fold][0].dtype == np.float32
        assert all_views[fold][1].dtype == np.float32
    np.testing.assert_allclose(all_views[2][1] - all_views[0][1], 2, atol=1e-6)


class HalfEngine:
    """An engine whose features are float16, and whose sums float16 would round or overflow."""

    device = "cpu"

    def run(self, images: Pixels) -> Outputs:
        features = 1000 + images[:, 0, 0, :2].astype(np.float16) * 100
        return features, np.zeros((len(images), 1), np.float32)


def test_features_in_float16_are_averaged_in_float32() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    engine = HalfEngine()
    averaged = run_averaged({0: engine}, images, "d4")[0][0]
    single = [engine.run(apply_view(images, *view))[0] for view in VIEWS["d4"]]
    np.testing.assert_array_equal(averaged, np.mean(single, axis=0, dtype=np.float32))
    assert averaged.dtype == np.float32


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
