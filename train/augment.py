"""Augmentation levels, as data. All work on uint8 [size, size, 3] after the resize."""

from typing import Any

import albumentations as A

LIGHT: tuple[Any, ...] = (
    A.SquareSymmetry(p=1.0),
    A.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.15, p=0.7),
)
MEDIUM: tuple[Any, ...] = (
    *LIGHT,
    A.HueSaturationValue(hue_shift_limit=8, sat_shift_limit=20, val_shift_limit=10, p=0.5),
    A.Affine(
        scale=(0.85, 1.15), translate_percent=(-0.06, 0.06), rotate=(-30, 30), border_mode=4, p=0.7
    ),
)
HEAVY: tuple[Any, ...] = (
    *MEDIUM,
    A.OneOf([A.GaussianBlur(blur_limit=(3, 5)), A.MotionBlur(blur_limit=5), A.GaussNoise()], p=0.4),
    A.OneOf(
        [A.ElasticTransform(alpha=40, sigma=6), A.GridDistortion(), A.OpticalDistortion()], p=0.3
    ),
    A.CLAHE(clip_limit=3.0, p=0.3),
    A.CoarseDropout(
        num_holes_range=(1, 4), hole_height_range=(0.08, 0.2), hole_width_range=(0.08, 0.2), p=0.4
    ),
)
LEVELS: dict[str, tuple[Any, ...]] = {"none": (), "light": LIGHT, "medium": MEDIUM, "heavy": HEAVY}


def create_augmentation(level: str) -> Any | None:
    """Returns the albumentations pipeline of a level, None for `none`."""
    return A.Compose(list(LEVELS[level])) if LEVELS[level] else None
