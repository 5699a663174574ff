"""The facts that `isic check` prints, and exit code 2 if a dataset has problems."""

import re
import shutil
from pathlib import Path

import cv2
import h5py
import numpy as np
import polars as pl
import pytest

from isic.folds import Folds, draw_folds
from tests.support.commands import Cli
from tests.support.datasets import jpeg, small_table, write_hdf5


def facts(text: str, section: str) -> dict[str, str]:
    """Return the facts under one heading of the output."""
    block = text.split(f"\n{section}", 1)[1].split("\n\n", 1)[0]
    lines = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in block.splitlines()[1:])
    return {parts[0]: parts[1] for parts in lines if len(parts) == 2}


def fold_rows(text: str) -> list[list[int]]:
    block = text.split("\nfolds", 1)[1].split("\n\n", 1)[0]
    return [
        [int(cell.replace(",", "")) for cell in line.split()] for line in block.splitlines()[2:]
    ]


def rewrite(folder: Path, change: dict[str, bytes | None]) -> None:
    """Changes or drops images of the training split."""
    with h5py.File(folder / "train-image.hdf5") as file:
        images = {name: bytes(file[name][()]) for name in file}
    images |= {name: data for name, data in change.items() if data is not None}
    write_hdf5(
        folder / "train-image.hdf5",
        {name: images[name] for name in images if change.get(name, b"") is not None},
    )


def test_a_whole_dataset(synth_dataset: Path, cli: Cli) -> None:
    ended = cli("isic", "check", "--data", synth_dataset)
    assert ended.code == 0, ended.err
    train, test = facts(ended.out, "train"), facts(ended.out, "test")
    assert train["rows"] == "300"
    assert train["columns"] == "55 of the challenge's 55"
    assert train["positives"] == "15 (5.00 %)"
    assert train["patients"].startswith("28 with ")
    assert "sex 9 (3.00 %)" in train["blanks"]
    assert "age_approx 2 (0.67 %)" in train["blanks"]
    assert train["images"] == "300 in train-image.hdf5"
    assert train["decoded"] == "300 of 300"
    assert train["masks"] == "300 (100.00 %)"
    assert train["undecodable"] == "none"
    assert test["rows"] == "30"
    assert test["columns"] == "44 of the challenge's 44"
    assert "positives" not in test
    assert "Stand-in University Hospital" in test["unseen attribution"]
    assert test["sample submission"] == "30 rows, the table's ids"
    folds = np.array(fold_rows(ended.out))
    assert folds[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert folds[:, 1:].sum(axis=0).tolist() == [300, 28, 15]
    assert ended.out.endswith("no problems found\n")


def test_a_sample_of_the_images(synth_dataset: Path, cli: Cli) -> None:
    ended = cli("isic", "check", "--data", synth_dataset, "--sample", 12)
    assert ended.code == 0
    assert facts(ended.out, "train")["decoded"] == facts(ended.out, "test")["decoded"] == "12 of 12"


def test_a_table_of_ids_and_targets_only(tmp_path: Path, cli: Cli) -> None:
    small_table().drop("patient_id").write_csv(tmp_path / "train-metadata.csv")
    ended = cli("isic", "check", "--data", tmp_path)
    assert ended.code == 0
    train = facts(ended.out, "train")
    assert train["patients"] == "not known (no patient_id); each image is its own group"
    assert train["images"] == "none (metadata only)"
    assert "53: " in train["missing columns"]
    assert [row[2] for row in fold_rows(ended.out)] == [12] * 5


def test_unknown_columns_are_named(small_dataset: Path, cli: Cli) -> None:
    table = pl.read_csv(small_dataset / "train-metadata.csv").with_columns(
        pl.lit("x").alias("camera")
    )
    table.write_csv(small_dataset / "train-metadata.csv")
    ended = cli("isic", "check", "--data", small_dataset)
    assert ended.code == 0
    assert facts(ended.out, "train")["other columns"] == "1: camera"


def test_a_test_table_that_lacks_a_feature(synth_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    data = Path(shutil.copytree(synth_dataset, tmp_path / "data"))
    pl.read_csv(data / "test-metadata.csv").drop("tbp_lv_H").write_csv(data / "test-metadata.csv")
    ended = cli("isic", "check", "--data", data)
    assert ended.code == 2
    assert "the test table lacks columns that features are made of (1: tbp_lv_H)" in ended.err


def test_rows_without_image_and_images_without_row(small_dataset: Path, cli: Cli) -> None:
    rewrite(small_dataset, {"ISIC_0000003": None, "ISIC_0000009": None, "ISIC_9999999": jpeg()})
    ended = cli("isic", "check", "--data", small_dataset)
    train = facts(ended.out, "train")
    assert train["rows without image"] == "2: ISIC_0000003, ISIC_0000009"
    assert train["images without row"] == "1: ISIC_9999999"
    assert train["decoded"] == "58 of 58"
    assert ended.code == 2
    assert "2 train rows have no image, the first is ISIC_0000003" in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_images_that_do_not_decode(small_dataset: Path, cli: Cli) -> None:
    cut = jpeg(80)[:300]
    rewrite(small_dataset, {"ISIC_0000004": cut, "ISIC_0000007": b"not a picture"})
    ended = cli("isic", "check", "--data", small_dataset)
    assert (
        facts(ended.out, "train")["undecodable"]
        == "2: ISIC_0000004 (truncated JPEG), ISIC_0000007 (not an image)"
    )
    assert ended.code == 2
    assert (
        "1 problem: 2 train images do not decode, the first is ISIC_0000004 (truncated JPEG)"
        in ended.err
    )


def test_all_problems_are_in_one_message(small_dataset: Path, cli: Cli) -> None:
    rewrite(small_dataset, {"ISIC_0000003": None, "ISIC_0000004": b"x"})
    (small_dataset / "masks.hdf5").write_bytes(b"half a file")
    ended = cli("isic", "check", "--data", small_dataset)
    assert ended.code == 2
    assert "3 problems" in ended.err
    assert "masks.hdf5 is not an HDF5 file, its first bytes are b'half a file'" in ended.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a readable table"),
        ("isic_id,target\n", "has no rows"),
        ("isic_id,patient_id\nISIC_1,a\n", "lacks the column target"),
        ("isic_id,target\nISIC_1,3\n", "target must be 0 or 1"),
        ("isic_id,target\nISIC_1,0\nISIC_1,1\n", "1 duplicate isic_id"),
    ],
)
def test_a_broken_training_table(tmp_path: Path, cli: Cli, text: str, words: str) -> None:
    (tmp_path / "train-metadata.csv").write_text(text)
    ended = cli("isic", "check", "--data", tmp_path)
    assert ended.code == 2
    assert words in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_no_such_folder(tmp_path: Path, cli: Cli) -> None:
    ended = cli("isic", "check", "--data", tmp_path / "nowhere")
    assert ended.code == 2
    assert "no such folder" in ended.err


def test_a_truncated_image_file(small_dataset: Path, cli: Cli) -> None:
    path = small_dataset / "train-image.hdf5"
    path.write_bytes(path.read_bytes()[:5_000])
    ended = cli("isic", "check", "--data", small_dataset)
    assert ended.code == 2
    assert "not a whole HDF5 file" in ended.err


def test_one_class_has_no_folds(tmp_path: Path, cli: Cli) -> None:
    small_table().with_columns(pl.lit(0).alias("target")).write_csv(tmp_path / "train-metadata.csv")
    ended = cli("isic", "check", "--data", tmp_path)
    assert ended.code == 2
    assert "no folds can be drawn" in ended.err


def with_plan(folder: Path, fold: pl.Series) -> Path:
    """Write a dataset of 60 rows and a fold plan of its own."""
    small_table().write_csv(folder / "train-metadata.csv")
    Folds(small_table().select("isic_id", fold.alias("fold"))).write(folder / "folds.parquet")
    return folder


def test_the_folds_of_a_plan_that_lies_with_the_dataset(tmp_path: Path, cli: Cli) -> None:
    plan = draw_folds(small_table(), 3, 7).of(small_table())
    data = with_plan(tmp_path, plan)
    ended = cli("isic", "check", "--data", data, "--num_folds", 3)
    assert ended.code == 0
    assert "folds (folds.parquet)" in ended.out
    rows = {row[0]: row[1] for row in fold_rows(ended.out.removesuffix("\nno problems found\n"))}
    assert rows == dict(plan.value_counts().sort("fold").iter_rows())
    ended = cli("isic", "check", "--data", data)
    assert ended.code == 2
    assert "folds.parquet has 3 folds, not 5; use --num_folds 3" in ended.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("split", r"folds\.parquet puts patient IP_0000000 into two folds"),
        ("rows", r"folds\.parquet lacks 1 rows of this dataset, the first is ISIC_0000059"),
        ("class", "fold 1 does not have rows of both classes"),
        ("text", r"folds\.parquet is not a Parquet file"),
    ],
)
def test_a_plan_that_training_would_refuse(
    tmp_path: Path, cli: Cli, change: str, words: str
) -> None:
    table = small_table()
    number = pl.Series([(row % 15) % 2 for row in range(60)], dtype=pl.Int8)
    if change == "split":
        number[0] = 1
    if change == "class":
        number = table["target"].cast(pl.Int8)
    data = with_plan(tmp_path, number)
    if change == "rows":
        Folds(table.select("isic_id", number.alias("fold"))[:-1]).write(data / "folds.parquet")
    if change == "text":
        (data / "folds.parquet").write_text("isic_id,fold\n")
    ended = cli("isic", "check", "--data", data, "--num_folds", 2)
    assert ended.code == 2
    assert re.search(words, ended.err)
    assert "delete" not in ended.err


def test_a_submission_of_other_rows(small_dataset: Path, cli: Cli) -> None:
    table = small_table().drop("target")
    table.write_csv(small_dataset / "test-metadata.csv")
    table[:30].select("isic_id", pl.lit(0.5).alias("target")).write_csv(
        small_dataset / "sample_submission.csv"
    )
    ended = cli("isic", "check", "--data", small_dataset)
    assert ended.code == 2
    assert "sample_submission.csv does not have the ids of the test table" in ended.err
    assert facts(ended.out, "test")["images"] == "none (metadata only)"


def to_folder(dataset: Path, suffix: str = ".jpg") -> Path:
    """Move the training images into a folder."""
    folder = dataset / "train-image"
    folder.mkdir()
    with h5py.File(dataset / "train-image.hdf5") as file:
        for name in file:
            (folder / f"{name}{suffix}").write_bytes(file[name][()])
    (dataset / "train-image.hdf5").unlink()
    return folder


def test_images_that_cannot_be_opened_are_one_problem_of_several(
    small_dataset: Path, cli: Cli
) -> None:
    small_table().with_columns(target=pl.lit(0)).write_csv(small_dataset / "train-metadata.csv")
    folder = to_folder(small_dataset)
    (folder / "again").mkdir()
    for name in ("ISIC_0000003", "ISIC_0000009"):
        (folder / "again" / f"{name}.JPG").write_bytes(jpeg())
    ended = cli("isic", "check", "--data", small_dataset)
    assert ended.code == 2
    assert "2 problems" in ended.err
    assert "2 images have the id of another" in ended.err
    assert "again/ISIC_0000003.JPG" in ended.err
    assert facts(ended.out, "train")["images"] == "cannot be read"


def test_entries_and_files_that_are_not_read_are_listed(small_dataset: Path, cli: Cli) -> None:
    with h5py.File(small_dataset / "train-image.hdf5", "a") as file:
        file.create_group("extra")
        del file["ISIC_0000003"]
        file["ISIC_0000003"] = h5py.SoftLink("/gone")
    ended = cli("isic", "check", "--data", small_dataset)
    train = facts(ended.out, "train")
    reason = "a link to /gone, which cannot be opened"
    assert train["not images"] == f"2: ISIC_0000003 ({reason}), extra (a group)"
    assert ended.code == 2
    assert f"1 train rows have no image, the first is ISIC_0000003 ({reason})" in (ended.err)
    (small_dataset / "train-image.hdf5").unlink()
    write_hdf5(small_dataset / "train-image.hdf5", dict.fromkeys(small_table()["isic_id"], jpeg()))
    folder = to_folder(small_dataset, ".Png")
    (folder / "ISIC_0000003.Png").rename(folder / "ISIC_0000003.gif")
    ended = cli("isic", "check", "--data", small_dataset)
    assert facts(ended.out, "train")["other files"] == "1: 1 .gif"
    assert ended.code == 2
    assert "1 train rows have no image" in ended.err


def test_ids_in_another_case_are_pointed_out(small_dataset: Path, cli: Cli) -> None:
    table = small_table()
    write_hdf5(
        small_dataset / "train-image.hdf5",
        dict.fromkeys(table["isic_id"].str.to_lowercase(), jpeg()),
    )
    ended = cli("isic", "check", "--data", small_dataset)
    assert ended.code == 2
    assert "; 60 differ from the name of an image in case only" in ended.err


def test_a_folder_beside_the_file_is_compared_with_it(small_dataset: Path, cli: Cli) -> None:
    data = (small_dataset / "train-image.hdf5").read_bytes()
    folder = to_folder(small_dataset)
    (small_dataset / "train-image.hdf5").write_bytes(data)
    ended = cli("isic", "check", "--data", small_dataset)
    assert ended.code == 0, ended.err
    train = facts(ended.out, "train")
    assert train["images"] == "60 in train-image.hdf5"
    assert train["train-image/"] == "not read; the same ids and file sizes"
    (folder / "ISIC_0000003.jpg").write_bytes(jpeg(99))
    (folder / "ISIC_0000004.jpg").unlink()
    ended = cli("isic", "check", "--data", small_dataset)
    difference = "1 images only in train-image.hdf5, 1 images of another size"
    assert ended.code == 2
    assert (
        f"train-image.hdf5 and train-image/ differ ({difference}) and only train-image.hdf5 is"
        in ended.err
    )


def test_images_under_nearly_the_right_name_are_pointed_out(small_dataset: Path, cli: Cli) -> None:
    (small_dataset / "train-image.hdf5").rename(small_dataset / "train-image.HDF5")
    ended = cli("isic", "check", "--data", small_dataset)
    images = facts(ended.out, "train")["images"]
    assert images.startswith("none (metadata only); 1: train-image.HDF5, but images are in")


def png(width: int, height: int, value: int = 255) -> bytes:
    return bytes(cv2.imencode(".png", np.full((height, width), value, np.uint8))[1])


def test_masks_are_compared_with_their_images(small_dataset: Path, cli: Cli) -> None:
    ids = small_table()["isic_id"].to_list()
    masks = {name: png(40 + row % 30, 40 + row % 30) for row, name in enumerate(ids)}
    masks |= {ids[1]: png(20, 10), ids[2]: png(42, 42, value=1), "ISIC_9": png(40, 40)}
    write_hdf5(small_dataset / "masks.hdf5", masks)
    with h5py.File(small_dataset / "masks.hdf5", "a") as file:
        file["more/ISIC_8"] = np.bytes_(png(40, 40))
    ended = cli("isic", "check", "--data", small_dataset)
    train, all_masks = facts(ended.out, "train"), facts(ended.out, "masks")
    assert train["masks"] == "60 (100.00 %)"
    assert train["masks of another size"] == f"1: {ids[1]} (mask 20 x 10, image 41 x 41)"
    unusable = f"{ids[2]} (its brightest red value is 1; in the lesion it must be 255)"
    assert train["unusable masks"] == f"1: {unusable}"
    assert all_masks["masks without row"] == "1: ISIC_9"
    assert all_masks["not images"] == "1: more (a group)"
    assert ended.code == 2
    assert f"1 train masks cannot be used, the first is {unusable}" in ended.err
    assert "1 masks belong to no row, the first is ISIC_9" in ended.err


@pytest.mark.parametrize(
    ("name", "rows"), [("real-pairs", "320"), ("real-crops", "8,166"), ("real-tabular", "885")]
)
def test_real_data(real_data: Path, cli: Cli, name: str, rows: str) -> None:
    ended = cli("isic", "check", "--data", real_data / name, "--sample", 300)
    assert ended.code == 0, ended.err
    train = facts(ended.out, "train")
    assert train["rows"] == rows
    assert train["positives"].startswith("240 ")
    assert train["images"] == "none (metadata only)" or train["decoded"] == "300 of 300"


def test_the_challenges_own_test_stub(real_data: Path, cli: Cli) -> None:
    ended = cli("isic", "check", "--data", real_data / "real-pairs", "--sample", 10)
    test = facts(ended.out, "test")
    assert test["columns"] == "44 of the challenge's 44"
    assert "unseen attribution" in test
    assert test["sample submission"] == "3 rows, the table's ids"
