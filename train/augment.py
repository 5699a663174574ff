"""Augmentation of single images and of batches."""

from collections.abc import Callable
from typing import Any

import albumentations as A
import torch
from timm.data import Mixup

from train.batch import Batch

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
"""Transforms of uint8 [size, size, 3], after the resize."""


def create_augmentation(level: str) -> Any | None:
    """Return the albumentations pipeline of a level, None for `none`."""
    return A.Compose(list(LEVELS[level])) if LEVELS[level] else None


def create_mixup(mixup: float, cutmix: float) -> Callable[[Batch], Batch]:
    """Return a function that mixes the images of a batch, and all their targets, in pairs.

    Args:
        mixup: alpha of the beta distribution (Zhang et al. 2018), 0 for none.
        cutmix: alpha of the beta distribution (Yun et al. 2019), 0 for none.
    """
    if not (mixup or cutmix):
        return lambda batch: batch
    mixer = Mixup(mixup, cutmix, label_smoothing=0.0, multi_label=True)

    def mix(batch: Batch) -> Batch:
        if len(batch.images) % 2:
            return batch  # timm mixes pairs; only the single batch of a small dataset can be odd
        # timm cuts and pastes along the last two axes, so it needs channels first.
        targets = batch.target[:, None]
        if len(batch.aux):
            targets = torch.cat([targets, batch.aux], dim=1)
        mixer.num_classes = targets.shape[1]
        pixels, mixed = mixer(batch.images.float().permute(0, 3, 1, 2), targets)
        return batch._replace(
            images=pixels.permute(0, 2, 3, 1), target=mixed[:, 0], aux=mixed[:, 1:]
        )

    return mix
