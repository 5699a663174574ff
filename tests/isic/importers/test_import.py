"""Each collection in its published layout becomes a dataset that the toolkit checks and trains."""

import shutil
import zipfile
from pathlib import Path
from typing import get_args

import polars as pl
import pytest

from isic import schema
from isic.dataset import Dataset
from isic.images import open_hdf5
from isic.importers.collections import COLLECTIONS
from isic.runtime.files import read_json, write_json
from isic.settings import ImportSettings
from tests.support.collections import ROWS, WRITERS, image_bytes, isic_name, mask_bytes, write
from tests.support.commands import TINY, Cli, Finished

POSITIVES = {"ham10000": 8, "isic2018": 12, "isic2019": 11, "isic2020": 6, "pad_ufes_20": 7}
GROUPS = {"ham10000": 8, "isic2018": 8, "isic2019": 8, "isic2020": 8, "pad_ufes_20": 8}
MASKS = {"ham10000": ROWS, "isic2018": 1}


@pytest.fixture(params=WRITERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(cli: Cli, name: str, source: Path, out: Path) -> Finished:
    return cli("isic", "import", name, "--source", source, "--out", out)


def imported(cli: Cli, name: str, folder: Path) -> Path:
    """Write a collection as published, import it, and return the dataset."""
    WRITERS[name](folder / "source")
    ended = run(cli, name, folder / "source", folder / "out")
    assert ended.code == 0, ended.err
    return folder / "out"


def test_every_collection_can_be_named() -> None:
    kind = ImportSettings.model_fields["collection"].annotation
    assert list(get_args(kind)) == list(COLLECTIONS) == list(WRITERS)


def test_a_dataset_with_the_files_bytes(name: str, tmp_path: Path, cli: Cli) -> None:
    out = imported(cli, name, tmp_path)
    table = Dataset(out).metadata("train")
    assert len(table) == ROWS
    assert int(table["target"].sum()) == POSITIVES[name]
    assert table["patient_id"].n_unique() == GROUPS[name]
    assert table.select("attribution", "copyright_license", "iddx_full").null_count().row(0) == (
        0,
        0,
        0,
    )
    assert set(table["copyright_license"]) == {COLLECTIONS[name].licence}
    assert set(table.columns) <= set(schema.TRAIN_ORDER), "other columns could become features"
    kind = "PNG" if name == "pad_ufes_20" else "JPEG"
    ids = table["isic_id"].to_list()
    assert sorted(Dataset(out).images("train").read(ids)) == sorted(
        image_bytes(row, kind) for row in range(ROWS)
    )
    masks = open_hdf5(out / "masks.hdf5")
    assert (len(masks) if masks else 0) == MASKS.get(name, 0)
    if masks:
        assert set(masks.read(masks.ids.tolist())) == {mask_bytes()}
    manifest = read_json(out / "import.json")
    assert (manifest["collection"], manifest["rows"]) == (name, ROWS)
    # Groups that the collection names are kept whole, and everything decodes.
    checked = cli("isic", "check", "--data", out, "--num_folds", 2)
    assert checked.code == 0, checked.err


def rows_of(out: Path, *columns: str) -> list[tuple[object, ...]]:
    return Dataset(out).metadata("train").sort("isic_id").select(*columns).rows()


def test_ham10000_in_the_challenges_words(tmp_path: Path, cli: Cli) -> None:
    out = imported(cli, "ham10000", tmp_path)
    found = rows_of(out, "isic_id", "patient_id", "age_approx", "sex", "anatom_site_general")
    assert found[:2] == [
        (isic_name(0), "HAM_0000000", 40.0, "female", "head/neck"),
        (isic_name(1), "HAM_0000000", 41.0, "female", "anterior torso"),
    ]
    assert found[3] == (isic_name(3), "HAM_0000001", None, "female", None)
    assert found[4] == (isic_name(4), "HAM_0000002", 44.0, None, "posterior torso")
    assert rows_of(out, "target", "iddx_full", "iddx_1")[:3] == [
        (1, "Malignant::Melanoma", "Malignant"),
        (0, "Benign::Nevus", "Benign"),
        (0, "Benign::Benign keratosis", "Benign"),
    ]
    attributions = [row[0] for row in rows_of(out, "attribution")]
    assert [str(text)[:5] for text in attributions[:4]] == ["ViDIR", "Cliff", "ViDIR", "ViDIR"]


def test_isic2019_in_the_challenges_words(tmp_path: Path, cli: Cli) -> None:
    out = imported(cli, "isic2019", tmp_path)
    found = rows_of(out, "isic_id", "patient_id", "anatom_site_general", "attribution", "iddx_full")
    assert found[5][0] == f"{isic_name(5)}_downsampled"
    assert found[10][1:4] == ("MSK4_0011169", None, "Memorial Sloan Kettering Cancer Center")
    assert found[12][1:4] == (
        "BCN_0003884",
        "anterior torso",
        "Department of Dermatology, Hospital Clínic de Barcelona",
    )
    assert found[14][1] is None, "a lesion that is not known is its own group"
    assert found[6][4] == "Indeterminate::Actinic keratosis"
    assert rows_of(out, "target")[6] == (0,)


def test_isic2020_in_the_challenges_words(tmp_path: Path, cli: Cli) -> None:
    out = imported(cli, "isic2020", tmp_path)
    columns = ("patient_id", "lesion_id", "sex", "age_approx", "anatom_site_general", "target")
    assert rows_of(out, *columns, "iddx_full")[:4] == [
        ("IP_0000000", "IL_0000000", "male", 45.0, "torso", 0, "Benign::Unknown benign"),
        ("IP_0000000", "IL_0000001", None, 45.0, "torso", 1, "Malignant::Melanoma"),
        ("IP_0000001", "IL_0000002", "male", None, "torso", 0, "Benign::Nevus"),
        ("IP_0000001", "IL_0000003", "male", 45.0, None, 1, "Malignant::Melanoma"),
    ]


def test_pad_ufes_20_in_the_challenges_words(tmp_path: Path, cli: Cli) -> None:
    out = imported(cli, "pad_ufes_20", tmp_path)
    columns = ("isic_id", "patient_id", "sex", "anatom_site_general", "clin_size_long_diam_mm")
    found = {row[0]: row[1:] for row in rows_of(out, *columns)}
    assert found["PAT_0_0_100"] == ("PAT_0", "female", "upper extremity", 6.0)
    assert found["PAT_0_1_101"] == ("PAT_0", None, "head/neck", None)


def test_files_of_other_years_and_mirrors(tmp_path: Path, cli: Cli) -> None:
    """Dataverse's table has tabs, Kaggle's lacks a column and has a second copy of the images."""
    WRITERS["ham10000"](tmp_path / "tabs")
    table = tmp_path / "tabs" / "HAM10000_metadata.csv"
    table.with_suffix(".tab").write_text(table.read_text().replace(",", "\t"))
    table.unlink()
    assert run(cli, "ham10000", tmp_path / "tabs", tmp_path / "a").code == 0
    WRITERS["ham10000"](tmp_path / "kaggle")
    table = tmp_path / "kaggle" / "HAM10000_metadata.csv"
    pl.read_csv(table).drop("dataset").write_csv(table)
    images = tmp_path / "kaggle" / "HAM10000_images_part_1"
    shutil.copytree(images, tmp_path / "kaggle" / "again" / images.name)
    assert run(cli, "ham10000", tmp_path / "kaggle", tmp_path / "b").code == 0
    one, two = ((tmp_path / name / "train-image.hdf5").read_bytes() for name in "ab")
    assert one == two
    WRITERS["isic2020"](tmp_path / "siim")
    table = tmp_path / "siim" / "ISIC_2020_Training_GroundTruth_v2.csv"
    pl.read_csv(table).drop("lesion_id").write_csv(tmp_path / "siim" / "train.csv")
    table.unlink()
    (tmp_path / "siim" / "jpeg").mkdir()
    (tmp_path / "siim" / "train").rename(tmp_path / "siim" / "jpeg" / "train")
    assert run(cli, "isic2020", tmp_path / "siim", tmp_path / "c").code == 0


def test_a_second_import_replaces_the_first_and_nothing_else(tmp_path: Path, cli: Cli) -> None:
    out = imported(cli, "isic2020", tmp_path)
    assert run(cli, "isic2020", tmp_path / "source", out).code == 0
    (out / "import.json").unlink()
    refused = run(cli, "isic2020", tmp_path / "source", out)
    assert refused.code == 2
    assert "was not written by this command" in refused.err


def test_a_second_import_leaves_no_masks_of_the_first(tmp_path: Path, cli: Cli) -> None:
    out = imported(cli, "ham10000", tmp_path)
    WRITERS["isic2020"](tmp_path / "other")
    refused = run(cli, "isic2020", tmp_path / "other", out)
    assert refused.code == 2
    assert f"{out} holds an import of ham10000; choose another --output_dir" in refused.err
    for path in (tmp_path / "source").rglob("*segmentation*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert run(cli, "ham10000", tmp_path / "source", out).code == 0
    assert not (out / "masks.hdf5").exists()
    assert read_json(out / "import.json")["masks"] == 0
    (out / "masks.hdf5").write_bytes(b"one's own")
    assert run(cli, "ham10000", tmp_path / "source", out).code == 0
    assert (out / "masks.hdf5").exists(), "the import has not written it"


def test_masks_of_somebody_else_outlive_an_interrupted_import(tmp_path: Path, cli: Cli) -> None:
    out, source = imported(cli, "isic2020", tmp_path), tmp_path / "source"
    (out / "masks.hdf5").write_bytes(b"one's own")
    image = next(source.rglob("*.jpg"))
    content = image.read_bytes()
    image.write_bytes(content[:20])
    interrupted = run(cli, "isic2020", source, out)
    assert "is no whole image" in interrupted.err
    assert read_json(out / "import.json")["unfinished"]
    image.write_bytes(content)
    assert run(cli, "isic2020", source, out).code == 0
    assert (out / "masks.hdf5").read_bytes() == b"one's own"


def test_masks_of_somebody_else_are_not_replaced(tmp_path: Path, cli: Cli) -> None:
    out = imported(cli, "ham10000", tmp_path)
    manifest = read_json(out / "import.json")
    write_json(out / "import.json", {**manifest, "masks": 0})  # as of a source without masks
    masks = (out / "masks.hdf5").read_bytes()
    refused = run(cli, "ham10000", tmp_path / "source", out)
    assert refused.code == 2
    assert "masks.hdf5 exists and was not written by this command" in refused.err
    assert (out / "masks.hdf5").read_bytes() == masks


def test_wrong_and_incomplete_sources_are_one_sentence_each(tmp_path: Path, cli: Cli) -> None:
    source = tmp_path / "source"

    def refusal(name: str) -> str:
        ended = run(cli, name, source, tmp_path / "out")
        assert ended.code == 2
        assert not (tmp_path / "out").exists()
        assert ended.err.count("\n") == 1
        return ended.err

    assert "no such folder" in refusal("isic2019")
    source.mkdir()
    assert "has no ISIC_2019_Training_GroundTruth.csv; download it from https" in refusal(
        "isic2019"
    )
    with zipfile.ZipFile(source / "ISIC_2019_Training_Input.zip", "w"):
        pass
    assert "unpack ISIC_2019_Training_Input.zip there" in refusal("isic2019")
    WRITERS["isic2019"](source)
    assert "but the files of isic2019; run `python -m isic import isic2019`" in refusal("ham10000")
    image = next(source.rglob(f"{isic_name(4)}.jpg"))
    content = image.read_bytes()
    image.unlink()
    assert (
        f"lacks the images of 1 of 16 rows, the first is {isic_name(4)}; unpack "
        "ISIC_2019_Training_Input.zip there" in refusal("isic2019")
    )
    write(image, content)
    write(source / "ISIC_2019_Training_Input" / image.name, content + b"other")
    assert "have the same name and differ" in refusal("isic2019")
    (source / "ISIC_2019_Training_Input" / image.name).unlink()
    table = source / "ISIC_2019_Training_Metadata.csv"
    text = table.read_text()
    table.write_text(text.replace("age_approx", "years"))
    assert "ISIC_2019_Training_Metadata.csv lacks the column age_approx; add it" in refusal(
        "isic2019"
    )
    table.write_text(text.replace("55.0", "old"))
    assert 'the column age_approx holds "old", which is not a number' in refusal("isic2019")
    table.write_text("".join(text.splitlines(keepends=True)[:-2]))
    assert "Metadata.csv lacks 2 images, the first is ISIC_0024320" in refusal("isic2019")
    table.write_text(text)
    truth = source / "ISIC_2019_Training_GroundTruth.csv"
    truth.write_text(truth.read_text().replace("1.0", "0.0"))
    assert "16 rows do not have exactly one diagnosis" in refusal("isic2019")


def test_a_word_that_is_not_published_is_named(tmp_path: Path, cli: Cli) -> None:
    WRITERS["pad_ufes_20"](tmp_path / "source")
    table = tmp_path / "source" / "metadata.csv"
    text = table.read_text()
    table.write_text(text.replace("THIGH", "TAIL").replace(",biopsed\n", ",biopsed,extra\n"))
    rows = table.read_text().splitlines()
    table.write_text("\n".join([rows[0], *(f"{row},1" for row in rows[1:])]) + "\n")
    ended = run(cli, "pad_ufes_20", tmp_path / "source", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "note: sites without an equivalent are blank: tail" in ended.out
    assert "note: columns of metadata.csv that are not imported: extra" in ended.out
    table.write_text(text.replace("SEK", "XYZ"))
    ended = run(cli, "pad_ufes_20", tmp_path / "source", tmp_path / "other")
    assert ended.code == 2
    assert 'PAD-UFES-20 has no diagnosis "XYZ", only ACK, BCC, MEL' in ended.err


@pytest.mark.slow
def test_an_epoch_on_an_imported_collection(name: str, tmp_path: Path, cli: Cli) -> None:
    out = imported(cli, name, tmp_path)
    flags = ("--data", out, "--output_dir", tmp_path / "runs", "--num_folds", 2, "--fold", 0)
    ended = cli("train", *TINY, *flags, "--epochs", 1, "--batch_size", 4)
    assert ended.code == 0, ended.err
    assert (tmp_path / "runs" / "tiny" / "fold_0" / "best_model.pth").is_file()
