"""`infer explain`: which network makes a map, the files, and refusals."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest

from infer import load_embedder, occlusion_map
from infer.explain.explain import safe_names
from infer.explain.picture import GAP, SIDE
from isic.dataset import Dataset
from isic.folds import read_folds
from tests.support.commands import Cli
from tests.support.datasets import jpeg


def flags(run: Path, data: Path, out: Path, *more: object) -> list[object]:
    where = ["--model_dir", run, "--data", data, "--out", out]
    return ["explain", "--config", "tiny", *where, *more]


def read_table(out: Path) -> pl.DataFrame:
    return pl.read_parquet(out / "occlusion.parquet")


def test_train_images_by_the_fold_that_held_them_out(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    ids = Dataset(synth_dataset).metadata("train")["isic_id"][10:16].to_list()
    (tmp_path / "ids.txt").write_text("\n".join([*ids, "", ids[0]]))
    more = ("--ids", f"@{tmp_path / 'ids.txt'}")
    ended = cli("infer", *flags(exported, synth_dataset, tmp_path / "out", *more))
    assert ended.code == 0, ended.err
    assert "images=6 bad=0" in ended.out
    table = read_table(tmp_path / "out")
    assert table["isic_id"].to_list() == ids
    assert table["fold"].equals(read_folds(exported / "folds.parquet").of(table))
    assert table["fold"].n_unique() > 1
    assert table.schema["drop"] == pl.Array(pl.Float32, (7, 7))
    files = Dataset(synth_dataset).images("train").read(ids)
    with load_embedder(exported) as embedder:
        embedded = embedder.embed(files)
        for row, fold in enumerate(table["fold"]):
            drops = occlusion_map(embedder, [files[row]], folds=[fold])[0]
            np.testing.assert_allclose(table["drop"][row].to_numpy(), drops, atol=1e-5)
            logit = embedded.by_fold[fold].logits[row]
            assert table["logit"][row] == pytest.approx(logit, abs=1e-5)
    for name in ids:
        assert cv2.imread(str(tmp_path / "out" / f"{name}.png")).shape[1] > 700
    manifest = json.loads((tmp_path / "out" / "occlusion.parquet.json").read_text())
    assert (manifest["config"], manifest["split"], list(manifest["engines"])) == (
        "tiny",
        "train",
        ["0", "1", "2"],
    )


def test_test_images_by_the_mean_over_the_folds(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    ids = Dataset(synth_dataset).metadata("test")["isic_id"][:2].to_list()
    more = ("--split", "test", "--ids", ",".join(ids), "--fill", "blur", "--batch_size", 7)
    ended = cli("infer", *flags(exported, synth_dataset, tmp_path, *more))
    assert ended.code == 0, ended.err
    table = read_table(tmp_path)
    assert table["fold"].null_count() == 2
    files = Dataset(synth_dataset).images("test").read(ids)
    with load_embedder(exported) as embedder:
        expected = occlusion_map(embedder, files, fill="blur")
        by_fold = [occlusion_map(embedder, files, fill="blur", folds=[k]) for k in range(3)]
    np.testing.assert_allclose(table["drop"].to_numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(expected, np.mean(by_fold, axis=0), atol=1e-5)
    before = table["drop"].to_numpy()
    assert cli("infer", *flags(exported, synth_dataset, tmp_path, *more)).code == 0
    np.testing.assert_array_equal(read_table(tmp_path)["drop"].to_numpy(), before)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A dataset with test images only, with ids that are no names of files, and a damaged image."""
    root = tmp_path / "odd"
    (root / "test-image").mkdir(parents=True)
    names = ["Ärm 1", "cut", "lesion", "LESION"]
    pl.DataFrame({"isic_id": names}).write_csv(root / "test-metadata.csv")
    for number, name in enumerate(names):
        (root / "test-image" / f"{name}.jpg").write_bytes(jpeg(40, seed=number))
    (root / "test-image" / "cut.jpg").write_bytes(jpeg(40)[:300])
    return root


def test_a_damaged_image_and_names_that_are_no_files(
    exported: Path, odd: Path, tmp_path: Path, cli: Cli
) -> None:
    more = ("--split", "test", "--ids", "Ärm 1,cut,lesion,LESION")
    ended = cli("infer", *flags(exported, odd, tmp_path / "out", *more))
    assert ended.code == 0, ended.err
    assert "warning: cut has no map: truncated JPEG" in ended.err
    assert "images=3 bad=1" in ended.out
    files = [file.lower() for file in read_table(tmp_path / "out")["file"]]
    assert len(set(files)) == 3
    assert all(file.isascii() and " " not in file for file in files)
    assert sorted(path.name.lower() for path in (tmp_path / "out").glob("*.png")) == sorted(files)
    ended = cli("infer", *flags(exported, odd, tmp_path / "out", "--split", "test", "--ids", "cut"))
    assert ended.code == 2
    assert "none of the images can be used" in ended.err


def test_no_picture_of_an_earlier_run_stays(
    exported: Path, odd: Path, tmp_path: Path, cli: Cli
) -> None:
    """Beside the table of another network it would be taken for that network's."""
    other = Path(shutil.copytree(exported, tmp_path / "huge"))
    for path in other.glob("fold_*/model.onnx.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "huge"}))
    out = tmp_path / "out"
    split = ("--split", "test", "--ids")
    ended = cli("infer", *flags(exported, odd, out, *split, "Ärm 1,lesion,LESION"))
    assert ended.code == 0, ended.err
    (file,) = read_table(out).filter(pl.col("isic_id") == "LESION")["file"]
    before = cv2.imread(str(out / file))
    (out / "mine.png").write_bytes(b"mine")
    (odd / "test-image" / "lesion.jpg").write_bytes(jpeg(40)[:300])
    ended = cli("infer", *flags(other, odd, out, "--config", "huge", *split, "lesion,LESION"))
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in out.glob("*.png")) == sorted(
        [*read_table(out)["file"], "mine.png"]
    )
    after = cv2.imread(str(out / file))
    differs = np.flatnonzero(np.any(before != after, axis=(1, 2)))
    assert differs.min() > SIDE + GAP, "only the caption, which names the network, is another"


def test_an_edited_table_removes_no_other_files(
    exported: Path, odd: Path, tmp_path: Path, cli: Cli
) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine.png"
    command = flags(exported, odd, out, "--split", "test", "--ids", "lesion")
    assert cli("infer", *command).code == 0
    mine.write_bytes(b"mine")
    (out / "folder").mkdir()
    for name in ("../mine.png", str(mine), "folder", "occlusion.parquet.json"):
        read_table(out).with_columns(file=pl.lit(name)).write_parquet(out / "occlusion.parquet")
        ended = cli("infer", *command)
        assert ended.code == 0, ended.err
    assert mine.read_bytes() == b"mine"
    assert (out / "folder").is_dir()
    assert (out / "occlusion.parquet.json").is_file()


def test_safe_names() -> None:
    names = ["ISIC_1", "../../etc/passwd", "a/b", "a_b", "A_b", "", ".hidden", "x" * 300, "a\0b"]
    found = safe_names(names)
    assert found["ISIC_1"] == "ISIC_1"
    assert len({name.lower() for name in found.values()}) == len(names)
    for safe in found.values():
        assert Path(safe).name == safe
        assert safe[0] != "."
        assert len(safe) < 120


def test_what_cannot_be_explained_is_refused_before_anything_is_written(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    name = Dataset(synth_dataset).metadata("train")["isic_id"][0]
    run = Path(shutil.copytree(exported, tmp_path / "tiny"))
    fold = read_folds(run / "folds.parquet").find(pl.DataFrame({"isic_id": [name]}))[0]
    (run / f"fold_{fold}" / "model.onnx").unlink()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / f"{name}.png").write_bytes(b"mine")
    (tmp_path / "empty.txt").write_text("\n")
    cases: list[tuple[Path, Path, list[object], str]] = [
        (exported, tmp_path / "o", ["--ids", f"{name},ISIC_x"], "1 of 2 ids are not in the train"),
        (exported, tmp_path / "o", ["--ids", name, "--split", "test"], "not in the test table"),
        (exported, tmp_path / "o", [], "--ids is required"),
        (exported, tmp_path / "o", ["--ids", f"@{tmp_path}/no.txt"], "no.txt is missing"),
        (exported, tmp_path / "o", ["--ids", f"@{tmp_path}/empty.txt"], "--ids has no ids"),
        (exported, taken, ["--ids", name], "was not written by this command"),
        (run, tmp_path / "o", ["--ids", name], f"was held out by fold_{fold}, which has no such"),
    ]
    for model_dir, out, more, message in cases:
        ended = cli("infer", *flags(model_dir, synth_dataset, out, *more))
        assert ended.code == 2, message
        assert message in ended.err
        assert ended.err.count("\n") == 1
        assert not (tmp_path / "o").exists()
    assert (taken / f"{name}.png").read_bytes() == b"mine"
