"""Images that are alike are found, others are not; within a dataset and between folders."""

import itertools
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest

from isic import duplicates
from isic.duplicates import MAX_DISTANCE, NUM_BANDS, difference_hash, distance, near_pairs, popcount
from isic.preprocess import Pixels
from tests.isic.test_check import facts
from tests.support.commands import Cli
from tests.support.datasets import jpeg, write_hdf5


def picture(seed: int, side: int = 128) -> Pixels:
    """Smooth blotches, uint8 [side, side, 3]; no two seeds are alike."""
    coarse = np.random.default_rng(seed).uniform(40, 220, (6, 6, 3)).astype(np.float32)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype("u1")


def encode(image: Pixels, quality: int = 95, ending: str = ".jpg") -> bytes:
    return bytes(cv2.imencode(ending, image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


COPIES = {
    "compressed again": lambda image: cv2.imdecode(np.frombuffer(encode(image, 60), np.uint8), 1),
    "half the size": lambda image: cv2.resize(image, None, fx=0.5, fy=0.5),
    "three times the size": lambda image: cv2.resize(image, None, fx=3, fy=3),
    "brighter": lambda image: cv2.convertScaleAbs(image, alpha=1.1, beta=8),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_has_nearly_the_same_hash_and_another_image_has_not(kind: str) -> None:
    images = [picture(seed) for seed in range(30)]
    hashes = np.stack([difference_hash(image)[0] for image in images])
    copies = np.stack([difference_hash(COPIES[kind](image))[0] for image in images])
    both = np.concatenate([hashes, copies])
    rows = np.arange(30)
    assert distance(both, rows, rows + 30).max() <= MAX_DISTANCE
    others = np.array(list(itertools.combinations(range(30), 2)))
    assert distance(both, *others.T).min() > MAX_DISTANCE


def flipped(hashes: np.ndarray, num_bits: int, seed: int) -> np.ndarray:
    """Change that many bits of each hash."""
    random = np.random.default_rng(seed)
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    for row in bits:
        row[random.choice(256, num_bits, replace=False)] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64)


def test_near_pairs_are_those_of_a_comparison_of_all() -> None:
    random = np.random.default_rng(0)
    base = random.integers(0, 2**64, (40, 4), np.uint64)
    hashes = np.concatenate([base, *(flipped(base, bits, bits) for bits in (0, 3, 9, 40))])
    pairs, bits = near_pairs(hashes)
    every = np.array(list(itertools.combinations(range(len(hashes)), 2)))
    expected = every[distance(hashes, *every.T) <= MAX_DISTANCE]
    assert np.array_equal(pairs, expected)
    assert np.array_equal(bits, distance(hashes, *expected.T))
    assert len(near_pairs(hashes[:0])[0]) == len(near_pairs(hashes[:1])[0]) == 0


@pytest.mark.parametrize(("num_bits", "share"), [(NUM_BANDS - 1, 1.0), (MAX_DISTANCE, 0.97)])
def test_what_is_missed_is_what_the_documentation_says(num_bits: int, share: float) -> None:
    base = np.random.default_rng(1).integers(0, 2**64, (2_000, 4), np.uint64)
    pairs, _ = near_pairs(np.concatenate([base, flipped(base, num_bits, 2)]))
    assert len(pairs) >= share * len(base)


def test_many_images_with_one_part_in_common_are_not_all_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(duplicates, "MAX_NEIGHBOURS", 3)
    pairs, _ = near_pairs(np.zeros((50, 4), np.uint64))
    assert len(pairs) == 49 + 48


def test_the_number_of_ones() -> None:
    words = np.array([0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF], np.uint64)
    assert popcount(words).tolist() == [int(word).bit_count() for word in words.tolist()]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Eight training and four test images, with copies of each kind between and within them."""
    folder = tmp_path / "data"
    folder.mkdir()
    train = {f"T{row}": encode(picture(row)) for row in range(6)}
    train["T6"] = train["T0"]
    train["T7"] = encode(picture(1), quality=70)
    png = encode(cv2.imdecode(np.frombuffer(train["T2"], np.uint8), 1), ending=".png")
    test = {"S0": train["T3"], "S1": png, "S2": encode(picture(50)), "S3": encode(picture(51))}
    write_hdf5(folder / "train-image.hdf5", train)
    write_hdf5(folder / "test-image.hdf5", test)
    patients = ["P0", "P1", "P2", "P3", "P4", "P5", "P9", "P1"]
    table = {"isic_id": list(train), "target": [0, 1] * 4, "patient_id": patients}
    pl.DataFrame(table).write_csv(folder / "train-metadata.csv")
    pl.DataFrame({"isic_id": list(test), "patient_id": ["P3", "Q", "P0", None]}).write_csv(
        folder / "test-metadata.csv"
    )
    return folder


def test_copies_within_a_dataset_and_shared_patients(dataset: Path, cli: Cli) -> None:
    ended = cli("isic", "check", "--data", dataset, "--num_folds", 2)
    assert ended.code == 0, ended.err
    found = facts(ended.out, "images that are alike")
    assert found["compared"] == "8 of train, 4 of test"
    assert found["within train"].startswith(
        "1 same bytes, 1 nearly the same, 1 of different patients; T0 = T6 (same bytes), T1 = T7"
    )
    assert found["train and test"].startswith("1 same bytes, 1 same pixels, 1 of different")
    assert "T3 = S0 (same bytes), T2 = S1 (same pixels)" in found["train and test"]
    assert found["within test"] == "none"
    test = facts(ended.out, "test")
    assert test["patients in train too"] == "2: P0, P3"
    assert test["rows in train too"] == "none"


def test_other_folders_are_compared_and_every_pair_is_written(
    dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    photos = tmp_path / "photos" / "deep"
    photos.mkdir(parents=True)
    (photos / "a.JPG").write_bytes(encode(picture(4)))
    (photos / "b.webp").write_bytes(encode(picture(50), ending=".webp"))
    (photos / "c.png").write_bytes(encode(picture(99), ending=".png"))
    (photos / "broken.jpg").write_bytes(b"\xff\xd8")
    output = tmp_path / "pairs.csv"
    flags = ("--data", dataset, "--num_folds", 2, "--against", f"{tmp_path / 'photos'},{dataset}")
    ended = cli("isic", "check", *flags, "--out", output)
    assert ended.code == 0, ended.err
    found = facts(ended.out, "images that are alike")
    name = str(tmp_path / "photos")
    assert found[f"train and {name}"] == "1 same bytes; T4 = deep/a.JPG (same bytes)"
    assert found[f"test and {name}"] == "1 nearly the same; S2 = deep/b.webp (nearly the same)"
    assert found[f"undecodable in {name}"] == "1"
    assert f"within {name}" not in found, "other folders are not the question"
    assert found[f"train and {dataset}/train"].startswith("8 same bytes")
    pairs = pl.read_csv(output)
    assert set(pairs["source"]) == {"train", "test"}
    row = pairs.filter(isic_id="S2", other_source=name)
    assert row["other_id"].to_list() == ["deep/b.webp"]
    assert row["kind"].to_list() == ["nearly the same"]
    between = pairs.filter(source="test", other_source=f"{dataset}/train")
    assert between["isic_id", "other_id", "kind"].rows() == [
        ("S0", "T3", "same bytes"),
        ("S1", "T2", "same pixels"),
    ]
    within = pairs.filter(source="train", other_source=f"{dataset}/train", kind="nearly the same")
    assert within["isic_id", "other_id"].rows() == [("T1", "T7"), ("T7", "T1")]
    parquet = tmp_path / "pairs.parquet"
    assert cli("isic", "check", *flags, "--output", parquet).code == 0
    assert pl.read_parquet(parquet)["other_id"].to_list() == pairs["other_id"].to_list()


def test_images_without_structure_are_compared_by_their_bytes(tmp_path: Path, cli: Cli) -> None:
    images = {f"ISIC_{row}": jpeg(20, 10 * row) for row in range(6)}
    images["ISIC_6"] = images["ISIC_0"]
    write_hdf5(tmp_path / "train-image.hdf5", images)
    table = {"isic_id": list(images), "target": [0, 1, 0, 1, 0, 1, 0]}
    pl.DataFrame(table).write_csv(tmp_path / "train-metadata.csv")
    ended = cli("isic", "check", "--data", tmp_path, "--num_folds", 2)
    found = facts(ended.out, "images that are alike")
    assert found["without structure"] == "7, compared by their bytes only"
    assert found["within train"] == "1 same bytes; ISIC_0 = ISIC_6 (same bytes)"


def test_wrong_flags_are_refused(dataset: Path, tmp_path: Path, cli: Cli) -> None:
    ended = cli("isic", "check", "--data", dataset, "--against", tmp_path / "no")
    assert ended.code == 2
    assert "does not exist; give a folder or a list of images" in ended.err
    ended = cli("isic", "check", "--data", dataset, "--out", tmp_path / "pairs.txt")
    assert ended.code == 2
    assert "give a name that ends in .csv or .parquet" in ended.err
    (dataset / "train-image.hdf5").unlink()
    (dataset / "test-image.hdf5").unlink()
    ended = cli("isic", "check", "--data", dataset, "--num_folds", 2, "--against", dataset.parent)
    assert "holds no images" in ended.err
