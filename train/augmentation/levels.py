"""The levels of augmentation: which transforms, in which ranges and how often.

Both the albumentations pipeline and the one on the device are built from these tables.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

CONSTANT = 0
REFLECT_101 = 4
"""Border modes of OpenCV."""


class Step(NamedTuple):
    """A transform that changes a share of the images."""

    name: str
    """Class of albumentations."""
    p: float
    """Probability; of a choice, its weight."""
    options: Mapping[str, Any] = {}
    """Arguments of the class; a range is (low, high)."""
    choices: tuple["Step", ...] = ()
    """Of OneOf."""


LIGHT = (
    Step("SquareSymmetry", 1.0),
    Step(
        "RandomBrightnessContrast",
        0.7,
        {"brightness_limit": (-0.15, 0.15), "contrast_limit": (-0.15, 0.15)},
    ),
)
MEDIUM = (
    *LIGHT,
    Step(
        "HueSaturationValue",
        0.5,
        {"hue_shift_limit": (-8, 8), "sat_shift_limit": (-20, 20), "val_shift_limit": (-10, 10)},
    ),
    Step(
        "Affine",
        0.7,
        {
            "scale": (0.85, 1.15),
            "translate_percent": (-0.06, 0.06),
            "rotate": (-30, 30),
            "border_mode": REFLECT_101,
        },
    ),
)
HEAVY = (
    *MEDIUM,
    Step(
        "OneOf",
        0.4,
        choices=(
            Step("GaussianBlur", 0.5, {"blur_limit": (3, 5)}),
            Step("MotionBlur", 0.5, {"blur_limit": (3, 5)}),
            Step("GaussNoise", 0.5, {"std_range": (0.2, 0.44)}),
        ),
    ),
    Step(
        "OneOf",
        0.3,
        choices=(
            Step("ElasticTransform", 0.5, {"alpha": 40, "sigma": 6}),
            Step("GridDistortion", 0.5, {"num_steps": 5, "distort_limit": (-0.3, 0.3)}),
            Step("OpticalDistortion", 0.5, {"distort_limit": (-0.05, 0.05)}),
        ),
    ),
    Step("CLAHE", 0.3, {"clip_limit": (1.0, 3.0)}),
    Step(
        "CoarseDropout",
        0.4,
        {
            "num_holes_range": (1, 4),
            "hole_height_range": (0.08, 0.2),
            "hole_width_range": (0.08, 0.2),
        },
    ),
)
# The recipe of https://arxiv.org/abs/2010.05351, which albumentations 0.4 ran before the resize and
# which its version 2 can express but for two details: the elastic distortion had a random affine
# part, and a hole could cross the border.
SIIM2020 = (
    Step("Transpose", 0.5),
    Step("VerticalFlip", 0.5),
    Step("HorizontalFlip", 0.5),
    Step(
        "RandomBrightnessContrast",
        0.75,
        {"brightness_limit": (-0.2, 0.2), "contrast_limit": (0, 0)},
    ),
    Step(
        "RandomBrightnessContrast",
        0.75,
        {"brightness_limit": (0, 0), "contrast_limit": (-0.2, 0.2)},
    ),
    Step(
        "OneOf",
        0.7,
        choices=(
            Step("MotionBlur", 0.5, {"blur_limit": (3, 5)}),
            Step("MedianBlur", 0.5, {"blur_limit": (3, 5)}),
            Step("GaussianBlur", 0.5, {"blur_limit": (3, 5)}),
            # Variances of 5 to 30 grey levels, as shares of 255.
            Step("GaussNoise", 0.5, {"std_range": (5**0.5 / 255, 30**0.5 / 255)}),
        ),
    ),
    Step(
        "OneOf",
        0.7,
        choices=(
            Step("OpticalDistortion", 0.5, {"distort_limit": (-1, 1)}),
            Step("GridDistortion", 0.5, {"num_steps": 5, "distort_limit": (-1, 1)}),
            Step("ElasticTransform", 0.5, {"alpha": 3, "sigma": 50}),
        ),
    ),
    Step("CLAHE", 0.7, {"clip_limit": (1, 4)}),
    Step(
        "HueSaturationValue",
        0.5,
        {"hue_shift_limit": (-10, 10), "sat_shift_limit": (-20, 20), "val_shift_limit": (-10, 10)},
    ),
    Step(
        "Affine",
        0.85,
        {
            "scale": (0.9, 1.1),
            "keep_ratio": True,
            "translate_percent": (-0.1, 0.1),
            "rotate": (-15, 15),
            "border_mode": CONSTANT,
        },
    ),
    Step(
        "CoarseDropout",
        0.7,
        {
            "num_holes_range": (1, 1),
            "hole_height_range": (0.375, 0.375),
            "hole_width_range": (0.375, 0.375),
        },
    ),
)
LEVELS: dict[str, tuple[Step, ...]] = {
    "none": (),
    "light": LIGHT,
    "medium": MEDIUM,
    "heavy": HEAVY,
    "siim2020": SIIM2020,
}
"""Transforms of uint8 [size, size, 3], after the resize, in their order."""
DEVICE_STEPS = ("SquareSymmetry", "RandomBrightnessContrast", "HueSaturationValue", "Affine")
"""Transforms that a batch on the device can pass, in this order and each once."""
DEVICE_LEVELS = tuple(
    name
    for name, steps in LEVELS.items()
    if steps and all(step.name in DEVICE_STEPS for step in steps)
)
"""Levels that a batch on the device can have."""
