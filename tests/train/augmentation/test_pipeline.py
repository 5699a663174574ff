from collections import Counter
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
from scipy.stats import chisquare

from isic.runtime.errors import UserError
from tests.support.commands import TINY, Cli, tiny_settings
from train.augmentation.levels import LEVELS
from train.augmentation.pipeline import (
    check_augmentation,
    create_augmentation,
    seed_augmentation,
)

SIDE = 48


def saved(path: Path, *transforms: Any) -> Path:
    """Write a pipeline as albumentations does."""
    data_format = "json" if path.suffix == ".json" else "yaml"
    A.save(A.Compose(list(transforms)), path, data_format=data_format)
    return path


def loaded(path: Path) -> Any:
    return tiny_settings(augmentation=str(path)).augmentation


@pytest.mark.parametrize("level", LEVELS)
def test_augmentation_keeps_shape_and_repeats_with_its_seed(level: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    augmentation = create_augmentation(level)
    if augmentation is None:
        return
    results = []
    for seed in (1, 2, 1):
        seed_augmentation(augmentation, seed)
        results.append(augmentation(image=image)["image"])
    assert results[0].shape == image.shape
    assert results[0].dtype == np.uint8
    assert (results[0] == results[2]).all()
    assert (results[0] != results[1]).any()


def test_transforms_are_drawn_independently() -> None:
    """Each of the four outcomes of two flips is equally frequent over the seeds of images."""
    pipeline = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)])
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    counts: Counter[bytes] = Counter()
    for seed in range(400):
        seed_augmentation(pipeline, seed)
        counts[pipeline(image=image)["image"].tobytes()] += 1
    assert len(counts) == 4
    assert chisquare(list(counts.values())).pvalue > 0.001


@pytest.mark.parametrize("name", ["mine.yaml", "mine.yml", "mine.json"])
def test_a_saved_pipeline_augments_as_the_one_it_was_saved_from(name: str, tmp_path: Path) -> None:
    level = "siim2020"
    own = create_augmentation(level)
    assert own is not None
    content = loaded(saved(tmp_path / name, *own.transforms))
    check_augmentation(content, SIDE, with_masks=True)
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    for seed in range(5):
        results = []
        for augmentation in (own, create_augmentation(content)):
            assert augmentation is not None
            seed_augmentation(augmentation, seed)
            results.append(augmentation(image=image)["image"])
        assert (results[0] == results[1]).all()


@pytest.mark.parametrize(
    ("transforms", "words"),
    [
        ([A.RandomCrop(20, 20, p=0.001)], r"turns the image into uint8 \[20, 20, 3\]"),
        ([A.Normalize(p=0.01)], r"turns the image into float32"),
        ([A.ToTensorV2(p=0.01)], r"turns the image into torch.uint8 \[3, 48, 48\]"),
        ([A.OneOf([A.HorizontalFlip(), A.Resize(9, 9)], p=0.1)], r"\[9, 9, 3\]"),
        ([A.RandomCrop(20, 20, p=0.5), A.Resize(48, 48, p=0.5)], r"uint8 \[20, 20, 3\]"),
        ([A.CoarseDropout(fill_mask=7, p=0.01)], "other values than 0 and 1 into a mask"),
    ],
)
def test_a_pipeline_that_changes_the_kind_of_an_image_is_refused(
    transforms: list[Any], words: str, tmp_path: Path
) -> None:
    """Also if it does so rarely, which would end a run in the middle."""
    content = loaded(saved(tmp_path / "mine.yaml", *transforms))
    with pytest.raises(UserError, match=words):
        check_augmentation(content, SIDE, with_masks=True)


def test_masks_are_only_checked_if_they_are_used(tmp_path: Path) -> None:
    content = loaded(saved(tmp_path / "mine.yaml", A.CoarseDropout(fill_mask=7)))
    check_augmentation(content, SIDE, with_masks=False)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "has no 'transform'"),
        ({"transform": {"__class_fullname__": "Flipp", "p": 1}}, "has no 'Flipp'"),
        ({"transform": {"__class_fullname__": "HorizontalFlip", "p": 1}}, "not Compose"),
        ({"transform": {"__class_fullname__": "os.system", "p": 1}}, "has no 'os.system'"),
        (
            {"transform": {"__class_fullname__": "Lambda", "__name__": "run", "p": 1}},
            "non-serializable",
        ),
        (
            {
                "transform": {
                    "__class_fullname__": "Compose",
                    "p": 1,
                    "transforms": [{"__class_fullname__": "Affine", "p": 1, "scale": "big"}],
                }
            },
            "cannot be used",
        ),
    ],
)
def test_a_file_that_is_no_pipeline_is_refused(content: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_augmentation(content, SIDE, with_masks=False)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gone.yaml", None, "no such file"),
        ("broken.json", "{", "is not valid YAML"),
        ("list.yaml", "- 1", 'must hold "key: value" lines'),
        ("resize.yaml", "resize", "[9, 9, 3]"),
        ("ligth", None, 'no such level, did you mean "light"?'),
    ],
)
def test_a_wrong_file_ends_training_before_it_starts(
    name: str, text: str | None, words: str, small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    path = tmp_path / name
    if text == "resize":
        saved(path, A.Resize(9, 9))
    elif text is not None:
        path.write_text(text)
    given = path if "." in name else name
    output = ["--output_dir", tmp_path / "out"]
    ended = cli("train", *TINY, "--data", small_dataset, "--augmentation", given, *output)
    assert ended.code == 2
    assert words in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_content_of_the_file_is_compared_when_a_run_continues(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    path = saved(tmp_path / "mine.yaml", A.HorizontalFlip())
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    assert cli("train", *flags, "--augmentation", path).code == 0
    other = saved(tmp_path / "other.json", A.HorizontalFlip())
    assert "finished" in cli("train", *flags, "--augmentation", other).out, "the same content"
    saved(path, A.HorizontalFlip(p=0.4))
    ended = cli("train", *flags, "--augmentation", path)
    assert ended.code == 2
    assert "was made with augmentation=a file of digest" in ended.err


def test_a_file_of_wrong_options_is_refused_without_a_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    wrong = {"__class_fullname__": "HorizontalFlip", "p": "much", "size": 3}
    content = {"transform": {"__class_fullname__": "Compose", "p": 1, "transforms": [wrong]}}
    with pytest.raises(UserError, match="cannot be used"):
        check_augmentation(content, SIDE, with_masks=False)
    assert not recwarn.list
