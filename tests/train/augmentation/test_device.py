"""The augmentation on the device against albumentations, which defines it."""

from collections import Counter

import albucore
import albumentations as A
import albumentations.augmentations.geometric.functional as geometric
import albumentations.augmentations.pixel.functional as colour
import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest, chisquare, ks_2samp, kstest

from tests.support.training import CPU
from train.augmentation.device import (
    SYMMETRIES,
    DeviceAugmentation,
    Values,
    create_device_augmentation,
    hashed_uniforms,
)
from train.augmentation.levels import DEVICE_LEVELS, DEVICE_STEPS, LEVELS, MEDIUM, Step
from train.augmentation.pipeline import build_transform
from train.batch import NO_MASK, Batch

Images = NDArray[np.uint8]

SIDE = 96
NUM_IMAGES = 500
# Of about 20 comparisons, one in 50 runs would fail by chance if the seeds were not fixed.
LEVEL = 0.001
"""Of significance."""
STEPS = {step.name: step for step in MEDIUM}
ARM = 10
"""Pixels between the centre and the dots of `dots`."""


def batch_of(images: Images, masks: Images | None = None) -> Batch:
    """Return a batch of images [N, SIDE, SIDE, 3] with seeds of their own."""
    rows = torch.arange(len(images))
    seeds = torch.from_numpy(np.random.default_rng(1).integers(2**31, size=len(images)))
    batch = Batch(torch.from_numpy(images), rows % 2 * 1.0, rows, seeds=seeds)
    return batch if masks is None else batch._replace(masks=torch.from_numpy(masks))


def smooth_images(number: int) -> Images:
    """Return images of noise without fine detail, in which interpolation errors are small."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(number):
        noise = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        blurred = cv2.GaussianBlur(noise, (0, 0), 4)
        images.append(cv2.normalize(blurred, None, 0, 255, cv2.NORM_MINMAX))
    return np.stack(images)


def on_device(image: Images, step: Step) -> Images:
    """Return NUM_IMAGES augmentations of an image by the device's version of a step."""
    batch = batch_of(np.stack([image] * NUM_IMAGES))
    return DeviceAugmentation([step], CPU)(batch).images.numpy()


def by_albumentations(image: Images, step: Step) -> Images:
    """Return NUM_IMAGES augmentations of an image by albumentations."""
    pipeline = A.Compose([build_transform(step)], seed=2)
    return np.stack([pipeline(image=image)["image"] for _ in range(NUM_IMAGES)])


def halves(left: tuple[int, ...], right: tuple[int, ...]) -> Images:
    image = np.empty((SIDE, SIDE, 3), np.uint8)
    image[:, : SIDE // 2] = left
    image[:, SIDE // 2 :] = right
    return image


def dots() -> Images:
    """Return an image with a dot in each channel: at the centre, on its right and below it."""
    image = np.zeros((SIDE, SIDE, 3), np.float32)
    middle = SIDE // 2
    for channel, (x, y) in enumerate(((0, 0), (ARM, 0), (0, ARM))):
        image[middle + y, middle + x, channel] = 1
    blurred = cv2.GaussianBlur(image, (0, 0), 1.5)
    return (blurred / blurred.max() * 255).astype(np.uint8)


def measure_contrast(images: Images) -> dict[str, NDArray[np.float64]]:
    """Return contrast and brightness of images that had the grey values 80 and 160."""
    low, high = (images[:, 0, column, 0].astype(float) for column in (0, -1))
    contrast = (high - low) / 80
    return {"contrast": contrast, "brightness": low - 80 * contrast}


def measure_hsv(images: Images) -> dict[str, NDArray[np.float64]]:
    """Return hue, saturation and value of images of one colour, in OpenCV's units."""
    pixels = images[:, :1, 0].astype(np.float32) / 255
    hue, saturation, value = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV).reshape(-1, 3).T
    return {"hue": hue / 2, "saturation": saturation * 255, "value": value * 255}


def measure_affine(images: Images) -> dict[str, NDArray[np.float64]]:
    """Return angle, scales and shifts of images of `dots`."""
    weights = images.astype(np.float64)
    axis = np.arange(SIDE)
    total = weights.sum(axis=(1, 2))
    x = (weights.sum(axis=1) * axis[:, None]).sum(axis=1) / total
    y = (weights.sum(axis=2) * axis[:, None]).sum(axis=1) / total
    (right_x, right_y), (below_x, below_y) = (
        ((x[:, dot] - x[:, 0]) / ARM, (y[:, dot] - y[:, 0]) / ARM) for dot in (1, 2)
    )
    return {
        "angle": np.degrees(np.arctan2(-right_y, right_x)),
        "scale_x": np.hypot(right_x, right_y),
        "scale_y": np.hypot(below_x, below_y),
        "shift_x": x[:, 0],
        "shift_y": y[:, 0],
    }


MEASURED = {
    "RandomBrightnessContrast": (halves((80,) * 3, (160,) * 3), measure_contrast),
    # A colour that OpenCV's whole numbers of hue, saturation and value hold exactly.
    "HueSaturationValue": (halves((150, 120, 90), (150, 120, 90)), measure_hsv),
    "Affine": (dots(), measure_affine),
}


def widened(step: Step) -> Step:
    """Return a step with ranges that are half as wide again."""
    options = {
        key: value
        if isinstance(value, int)
        else tuple(float(end) for end in np.mean(value) + 1.5 * (np.array(value) - np.mean(value)))
        for key, value in step.options.items()
    }
    return step._replace(options=options)


@pytest.mark.parametrize("name", MEASURED)
def test_parameters_are_distributed_as_those_of_albumentations(name: str) -> None:
    image, measure = MEASURED[name]
    always = STEPS[name]._replace(p=1.0)
    ours = measure(on_device(image, always))
    theirs = measure(by_albumentations(image, always))
    wider = measure(on_device(image, widened(always)))
    assert ours
    for key, values in ours.items():
        assert ks_2samp(values, theirs[key]).pvalue > LEVEL, key
        assert ks_2samp(wider[key], theirs[key]).pvalue < LEVEL, f"a wider range of {key} shows"


@pytest.mark.parametrize("name", MEASURED)
def test_a_step_changes_its_share_of_the_images(name: str) -> None:
    image, _ = MEASURED[name]
    step = STEPS[name]
    for augment in (on_device, by_albumentations):
        num_changed = int((augment(image, step) != image).any(axis=(1, 2, 3)).sum())
        assert binomtest(num_changed, NUM_IMAGES, step.p).pvalue > LEVEL


def test_the_eight_symmetries_are_equally_frequent() -> None:
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[:20, :10] = 255
    image[:20, -10:] = 100
    for augment in (on_device, by_albumentations):
        counts = Counter(map(np.ndarray.tobytes, augment(image, STEPS["SquareSymmetry"])))
        assert len(counts) == 8
        assert chisquare(list(counts.values())).pvalue > LEVEL


def augment_one(image: Images, values: Values, index: int) -> Images:
    """Augment an image by albumentations with the parameters of one image."""
    one = {key: float(value[index]) for key, value in values._asdict().items()}
    image = albucore.multiply_add(image, 1 + one["contrast"], 255 * one["brightness"])
    image = colour.shift_hsv(image, one["hue"], one["saturation"], one["value"])
    (x, transposed_x), (transposed_y, y) = SYMMETRIES[int(one["symmetry"])]
    if transposed_x:
        image, x, y = image.transpose(1, 0, 2), transposed_y, transposed_x
    image = np.ascontiguousarray(image[:: int(y), :: int(x)])
    matrix = geometric.create_affine_transformation_matrix(
        {axis: int(one[f"shift_{axis}"] * SIDE) for axis in "xy"},
        {"x": 0, "y": 0},
        {axis: one[f"scale_{axis}"] for axis in "xy"},
        one["degrees"],
        geometric.center((SIDE, SIDE)),
    )
    return geometric.warp_affine(image, matrix, cv2.INTER_LINEAR, 0, 4, (SIDE, SIDE))


@pytest.mark.parametrize(("level", "largest"), [("light", 0.01), ("medium", 0.6)])
def test_equal_parameters_give_the_pixels_of_albumentations(level: str, largest: float) -> None:
    """At most `largest` grey levels of difference on average: OpenCV's hue has steps of 2 degrees,
    and its coordinates steps of a 32nd of a pixel.
    """
    images = smooth_images(60)
    batch = batch_of(images)
    augmentation = DeviceAugmentation(LEVELS[level], CPU)
    values = augmentation.draw(batch.seeds)
    ours = augmentation(batch).images.numpy()
    for index, image in enumerate(images):
        theirs = augment_one(image, values, index)
        assert np.abs(ours[index].astype(int) - theirs).mean() < largest


@pytest.mark.parametrize("level", DEVICE_LEVELS)
def test_an_image_depends_on_its_own_seed_only(level: str) -> None:
    images = smooth_images(33)
    batch = batch_of(images, masks=(images[..., 0] > 128).astype(np.uint8))
    augment = create_device_augmentation(level, "device", CPU)
    whole = augment(batch)
    assert whole.images.shape == batch.images.shape
    assert whole.images.dtype == torch.uint8
    assert whole.images.is_contiguous()
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    for size in (1, 2, 7, 16, 32):
        for start in range(0, 33, size):
            chosen = order[start : start + size]
            part = augment(Batch(*(field[chosen] if len(field) else field for field in batch)))
            assert torch.equal(part.images, whole.images[chosen])
            assert torch.equal(part.masks, whole.masks[chosen])
    unused = torch.empty((33, 0, 0), dtype=torch.uint8)  # as loaders give it
    assert torch.equal(augment(batch._replace(masks=unused)).images, whole.images)
    other = augment(batch._replace(seeds=batch.seeds + 1))
    changed = (other.images != whole.images).flatten(1).any(1)
    assert changed.float().mean() > 0.9


def test_masks_move_with_their_images() -> None:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[10:50, 20:40] = 1
    image = np.stack([60 + 120 * mask] * 3, axis=-1)
    batch = batch_of(np.stack([image] * 40), np.stack([mask] * 39 + [np.full_like(mask, NO_MASK)]))
    augmented = DeviceAugmentation(MEDIUM, CPU)(batch)
    is_lesion = augmented.images[..., 0] > 120
    assert augmented.masks.dtype == torch.uint8
    assert ((is_lesion[:39] == augmented.masks[:39]).float().mean(dim=(1, 2)) > 0.98).all()
    assert (augmented.masks[39] == NO_MASK).all(), "an image without a mask"
    assert (augmented.masks[:39] != batch.masks[:39]).any(2).any(1).float().mean() > 0.8


def test_steps_that_are_not_applied_change_no_byte() -> None:
    never = [step._replace(p=0.0) for step in MEDIUM]
    images = np.random.default_rng(0).integers(0, 256, (20, SIDE, SIDE, 3), dtype=np.uint8)
    batch = batch_of(images)
    assert torch.equal(DeviceAugmentation(never, CPU)(batch).images, batch.images)
    assert create_device_augmentation("light", "workers", CPU)(batch) is batch


def test_parameters_are_uniform_and_independent() -> None:
    seeds = torch.arange(20_000)  # neighbours, the worst case
    uniform = hashed_uniforms(seeds, 12).numpy()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    for column in uniform.T:
        assert kstest(column, "uniform").pvalue > LEVEL
    correlation = np.corrcoef(uniform.T) - np.eye(12)
    assert np.abs(correlation).max() < 0.03
    following = np.corrcoef(uniform[:-1, 0], uniform[1:, 0])[0, 1]
    assert abs(following) < 0.03


def test_parameters_are_those_of_earlier_versions() -> None:
    """Otherwise a run could not be resumed or repeated."""
    uniform = hashed_uniforms(torch.tensor([0, 1, 2**31 - 1]), 2)
    expected = [[130277, 325842], [11672718, 8226555], [14950632, 5425224]]
    assert (uniform * 2**24).int().tolist() == expected


def test_every_step_of_the_device_is_compared() -> None:
    assert set(DEVICE_STEPS) == {"SquareSymmetry", *MEASURED}
