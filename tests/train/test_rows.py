from pathlib import Path

import cv2
import h5py
import numpy as np
import polars as pl
import pytest

from isic.provenance import read_seen
from isic.runtime.errors import UserError
from tests.support.commands import TINY, Cli, tiny_settings
from tests.support.datasets import jpeg, small_table, write_hdf5
from tests.support.training import write_extra
from train.rows import load_data, sample_rows


def test_use_sample_keeps_every_positive() -> None:
    table = small_table(900)
    sample = sample_rows(table, 400, seed=1)
    assert len(sample) == 400
    assert sample["target"].sum() == 300
    assert sample["isic_id"].is_sorted()
    assert sample_rows(table, 5000, seed=1).equals(table)


def test_one_class_only_is_refused(cli: Cli, tmp_path: Path) -> None:
    table = small_table(20).with_columns(target=pl.lit(0))
    table.write_csv(tmp_path / "train-metadata.csv")
    write_hdf5(tmp_path / "train-image.hdf5", {name: jpeg(20) for name in table["isic_id"]})
    ended = cli("train", *TINY, "--data", tmp_path, "--output_dir", tmp_path / "out")
    assert ended.code == 2
    assert "every target is 0" in ended.err


def skipped_of(output_dir: Path, dataset: Path) -> dict[str, str]:
    """Return the reason by id of the skipped images of a dataset."""
    table = pl.read_parquet(output_dir / "tiny" / "errors.parquet")
    return dict(table.filter(dataset=str(dataset)).select("isic_id", "reason").iter_rows())


def test_bad_images_stop_the_run_or_are_skipped(
    cli: Cli, small_dataset: Path, tmp_path: Path
) -> None:
    with h5py.File(small_dataset / "train-image.hdf5", "a") as file:
        del file["ISIC_0000004"], file["ISIC_0000007"]
        file["ISIC_0000007"] = np.bytes_(jpeg()[:500])
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    ended = cli("train", *flags)
    assert ended.code == 2
    assert "2 of 60 images cannot be used, the first is ISIC_0000004" in ended.err
    ended = cli("train", *flags, "--on_error", "skip")
    assert ended.code == 0
    errors = skipped_of(tmp_path, small_dataset)
    assert errors == {"ISIC_0000004": "no image for this id", "ISIC_0000007": "truncated JPEG"}


def test_skipped_images_of_all_datasets_are_listed(
    cli: Cli, small_dataset: Path, tmp_path: Path
) -> None:
    extras = [write_extra(tmp_path / name, [0, 1] * 4) for name in ("old", "older")]
    removed = {small_dataset: ["ISIC_0000004"], extras[0]: ["old_1"], extras[1]: ["older_0"]}
    for folder, ids in removed.items():
        with h5py.File(folder / "train-image.hdf5", "a") as file:
            for name in ids:
                del file[name]
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    flags += ["--extra_data", ",".join(map(str, extras)), "--on_error", "skip"]
    for _ in range(2):  # a second command lists each once too
        ended = cli("train", *flags, "--force")
        assert ended.code == 0, ended.err
        for folder, ids in removed.items():
            assert list(skipped_of(tmp_path, folder)) == ids
            assert f"{folder}: 1 of" in ended.out
        assert len(pl.read_parquet(tmp_path / "tiny" / "errors.parquet")) == 3


def test_no_image_is_skipped_for_its_suffix(cli: Cli, small_dataset: Path, tmp_path: Path) -> None:
    """Some suffixes are in capitals, as some cameras write them, and two files are unreadable."""
    folder = small_dataset / "train-image"
    folder.mkdir()
    with h5py.File(small_dataset / "train-image.hdf5") as file:
        for row, name in enumerate(file):
            (folder / f"{name}{'.JPG' if row % 9 == 0 else '.jpg'}").write_bytes(file[name][()])
    (small_dataset / "train-image.hdf5").unlink()
    for name in ("ISIC_0000010.jpg", "ISIC_0000012.jpg"):
        (folder / name).unlink()
    (folder / "ISIC_0000010.jpg").symlink_to("/gone")
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    ended = cli("train", *flags, "--on_error", "skip")
    assert ended.code == 0, ended.err
    errors = skipped_of(tmp_path, small_dataset)
    dead = "a link to /gone, which does not exist"
    assert errors == {"ISIC_0000010": dead, "ISIC_0000012": "no image for this id"}


def mask_png(width: int, height: int, value: int = 255) -> bytes:
    """Return a mask of one grey value."""
    return bytes(cv2.imencode(".png", np.full((height, width), value, np.uint8))[1])


def test_masks_that_may_be_wrong_are_warned_of(
    small_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = small_table()["isic_id"].to_list()
    masks = {name: mask_png(40 + row % 30, 40 + row % 30) for row, name in enumerate(ids[:50])}
    write_hdf5(
        small_dataset / "masks.hdf5", masks | {ids[3]: mask_png(9, 7), "isic_55": mask_png(9, 9)}
    )
    load_data(tiny_settings(data=small_dataset, output_dir=tmp_path, mask_weight=1.0))
    stretched, unmatched = capsys.readouterr().err.splitlines()
    assert stretched.startswith("warning: ")
    assert stretched.endswith(
        f"1 masks differ in size from their image and are stretched, the first is {ids[3]} "
        "(mask 9 x 7, image 43 x 43)"
    )
    assert unmatched.endswith(
        "1 masks belong to no training row, the first is isic_55; 10 training images have no mask"
    )


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (mask_png(42, 42, value=1), "its brightest red value is 1; in the lesion it must be 255"),
        (mask_png(42, 42)[:50], "truncated PNG"),
        (
            np.ones((42, 42), bool),
            "an array of 42 x 42 values, not the bytes of an image file",
        ),
        (h5py.SoftLink("/gone"), "a link to /gone, which cannot be opened"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused(
    small_dataset: Path, tmp_path: Path, mask: object, words: str
) -> None:
    write_hdf5(small_dataset / "masks.hdf5", {"ISIC_0000001": mask_png(41, 41)})
    with h5py.File(small_dataset / "masks.hdf5", "a") as file:
        file["ISIC_0000002"] = np.bytes_(mask) if isinstance(mask, bytes) else mask
    with pytest.raises(UserError) as caught:
        load_data(tiny_settings(data=small_dataset, output_dir=tmp_path, mask_weight=1.0))
    assert f"1 masks cannot be used, the first is ISIC_0000002 ({words}); fix" in str(caught.value)


def test_a_dataset_without_masks_is_refused(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    ended = cli(
        "train", *TINY, "--data", small_dataset, "--output_dir", tmp_path, "--mask_weight", 1
    )
    assert ended.code == 2
    assert "has no mask of any training image" in ended.err
    assert ended.err.count("\n") == 1


def test_extra_rows_are_trained_on_and_never_validated_on(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    extra = tmp_path / "extra"
    extra.mkdir()
    table = pl.DataFrame(
        {"isic_id": ["OLD_1", "OLD_2", "OLD_3", "ISIC_0000001"], "target": [1, 0, 1, 0]}
    )
    table = table.with_columns(patient_id=pl.Series([None, None, "IP_0000003", None]))
    table.write_csv(extra / "train-metadata.csv")
    write_hdf5(extra / "train-image.hdf5", {name: jpeg(40) for name in table["isic_id"]})
    flags = ["--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--num_folds", 3]
    ended = cli("train", *TINY, *flags, "--extra_data", extra, "--extra_weight", 2.5)
    assert ended.code == 0, ended.err
    assert "2 rows skipped, their image or patient is in another dataset" in ended.out
    scored = pl.concat(
        [pl.read_parquet(tmp_path / "tiny" / f"fold_{k}" / "oof.parquet") for k in range(3)]
    )
    assert sorted(scored["isic_id"]) == sorted(small_table()["isic_id"])
    data = load_data(
        tiny_settings(
            data=small_dataset, output_dir=tmp_path, name="tiny", num_folds=3, extra_data=[extra]
        )
    )
    assert data.table["isic_id"].to_list()[60:] == ["OLD_1", "OLD_2"]
    assert (data.fold[60:] == -1).all()
    seen = read_seen(tmp_path / "tiny" / "fold_1" / "trained_on.parquet")
    learned_from = data.table.filter(pl.Series(data.fold != 1))
    assert sorted(seen["isic_id"]) == sorted(learned_from["isic_id"]), "the extra rows too"


def test_extra_rows_that_are_all_in_the_dataset_are_skipped(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ["--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    ended = cli("train", *TINY, *flags, "--extra_data", small_dataset)
    assert ended.code == 0, ended.err
    assert "60 rows skipped" in ended.out, ended.err


def test_masks_stay_if_no_extra_row_is_left(small_dataset: Path, tmp_path: Path) -> None:
    write_hdf5(small_dataset / "masks.hdf5", {"ISIC_0000001": mask_png(41, 41)})
    settings = tiny_settings(
        data=small_dataset, output_dir=tmp_path, extra_data=[small_dataset], mask_weight=1.0
    )
    masks = load_data(settings).rows.masks
    assert masks is not None
    assert masks.is_empty.sum() == 59


@pytest.mark.parametrize("target", [0, 1])
def test_an_extra_dataset_of_one_class_is_warned_of_or_refused(
    target: int, small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    extra = write_extra(tmp_path / "single", [target] * 8)
    flags = [*TINY, "--data", small_dataset, "--epochs", 1, "--fold", 0, "--extra_data", extra]
    ended = cli("train", *flags, "--output_dir", tmp_path / "one")
    assert ended.code == 0
    assert f"the target of all 8 rows is {target}; the network" in ended.err
    ended = cli("train", *flags, "--output_dir", tmp_path / "two", "--negatives_per_positive", 3)
    if target:
        assert ended.code == 0
        assert "of --extra_data 8 positives and 0 negatives" in ended.out
    else:
        assert ended.code == 2
        assert not (tmp_path / "two").exists()
        assert "none of the 8 rows is positive" in ended.err
        assert ended.err.count("\n") == 1
