"""Embedding images that are no split of a dataset."""

from pathlib import Path

import numpy as np
import PIL.Image
import polars as pl
import pytest

from infer.embedding.store import IMAGES, read_run, scan_embeddings
from tests.support.commands import Cli
from tests.support.fake_run import SIZE, FakeRun, shard_bytes

ENDINGS = ("png", "JPG", "webp", "tif", "TIFF", "bmp", "jpeg")
NUM_FOLDS = 3


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven grey images of every ending, two of them with a name that another folder has too."""
    folder = tmp_path / "photos"
    for row, ending in enumerate(ENDINGS):
        path = folder / f"group {row % 2}" / f"photo_{row // 2}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (SIZE, SIZE), (20 * row,) * 3).save(path)
    return folder


def flags(fake_run: FakeRun, images: Path, output: Path, *more: object) -> list[str]:
    command = fake_run.flags(output, "--images", images, "--max_bad", 1, *more)
    at = command.index("--data")
    return command[:at] + command[at + 2 :]


def test_every_fold_embeds_every_image(
    fake_run: FakeRun, photos: Path, tmp_path: Path, cli: Cli
) -> None:
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 half")
    (photos / "fractions.tif").write_bytes(b"")
    ended = cli("infer", *flags(fake_run, photos, tmp_path / "out"))
    assert ended.code == 0, ended.err
    assert "embedding 9 images with folds 0, 1, 2" in ended.out
    assert "split=images images=7 bad=2" in ended.out
    root = tmp_path / "out" / "null"
    found = scan_embeddings(root, IMAGES).collect()
    assert len(found) == len(ENDINGS) * NUM_FOLDS
    assert found["isic_id"].n_unique() == len(ENDINGS)
    for row, ending in enumerate(ENDINGS):
        name = f"group {row % 2}/photo_{row // 2}.{ending}"
        features = found.filter(isic_id=name)["features"].to_numpy()
        assert np.abs(features - 20 * row / 255).max() < 0.01
    errors = pl.read_parquet(root / "images" / "errors.parquet")
    assert errors.rows() == [("broken.jpg", "truncated JPEG"), ("fractions.tif", "zero bytes")]
    assert not (root / "folds.parquet").exists(), "no plan of folds belongs to these images"
    assert read_run(root, IMAGES)["metadata_sha256"] is None
    again = cli("infer", *flags(fake_run, photos, tmp_path / "out"))
    assert "up to date config=null split=images" in again.out
    (photos / "new.png").write_bytes((photos / "group 0" / "photo_0.png").read_bytes())
    refused = cli("infer", *flags(fake_run, photos, tmp_path / "out"))
    assert refused.code == 2
    assert "holds embeddings made with other images" in refused.err


def test_a_run_without_a_fold_plan_embeds_images(
    fake_run: FakeRun, photos: Path, tmp_path: Path, cli: Cli
) -> None:
    """A model of somebody else's data comes without it."""
    model_dir = tmp_path / "models"
    model_dir.mkdir()
    for fold in range(NUM_FOLDS):
        (model_dir / f"fold_{fold}").symlink_to(fake_run.model_dir / f"fold_{fold}")
    run = FakeRun(fake_run.data, model_dir)
    assert cli("infer", *flags(run, photos, tmp_path / "out")).code == 0


def test_a_list_gives_ids_and_order(
    fake_run: FakeRun, photos: Path, tmp_path: Path, cli: Cli
) -> None:
    table = pl.DataFrame(
        {
            "isic_id": ["ISIC_2", "ISIC_0"],
            "path": ["photos/group 0/photo_1.webp", "photos/group 0/photo_0.png"],
        }
    )
    table.write_csv(tmp_path / "list.csv")
    assert cli("infer", *flags(fake_run, tmp_path / "list.csv", tmp_path / "out")).code == 0
    found = scan_embeddings(tmp_path / "out" / "null", IMAGES).collect()
    assert found["isic_id"].to_list() == ["ISIC_2", "ISIC_0"] * NUM_FOLDS
    # Processes open the list again, in another working directory perhaps.
    run = flags(fake_run, tmp_path / "list.csv", tmp_path / "two", "--num_processes", 2)
    assert cli("infer", *run).code == 0
    roots = (tmp_path / name / "null" / "images" for name in ("out", "two"))
    one, two = map(shard_bytes, roots)
    assert one == two


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split", "test"], "--images takes the place of a dataset; leave out --split"),
        (["--data", "data", "--folds", "all"], "leave out --data and --folds"),
    ],
)
def test_flags_of_a_dataset_are_refused(
    fake_run: FakeRun, photos: Path, tmp_path: Path, cli: Cli, more: list[str], message: str
) -> None:
    ended = cli("infer", *flags(fake_run, photos, tmp_path / "out", *more))
    assert ended.code == 2
    assert message in ended.err
