"""Augmentation of single images by albumentations: a level, or a pipeline from a file."""

import warnings
from collections.abc import Mapping
from random import Random
from typing import Any

import albumentations as A
import numpy as np

from isic.runtime.errors import UserError, first_line
from train.augmentation.levels import LEVELS, Step

NUM_TRIALS = 32
"""Images that a pipeline from a file is tried on, all its transforms applied."""


def create_augmentation(level: str | Mapping[str, Any]) -> Any | None:
    """Return the albumentations pipeline of a level, None for `none`.

    Args:
        level: one of LEVELS, or a pipeline as albumentations serialises it.
    """
    if not isinstance(level, str):
        return A.from_dict(dict(level))
    return A.Compose([build_transform(step) for step in LEVELS[level]]) if LEVELS[level] else None


def build_transform(step: Step) -> Any:
    """Return the albumentations transform of a step."""
    if step.choices:
        return A.OneOf([build_transform(choice) for choice in step.choices], p=step.p)
    return getattr(A, step.name)(**step.options, p=step.p)


def seed_augmentation(pipeline: Any, seed: int) -> None:
    """Seed a pipeline for one image."""
    # Not by set_random_seed, which gives each transform a generator of the same seed: all of them
    # would be applied together, at the same places of their ranges. Seen with albumentations 2.0.8,
    # the last under its licence.
    pipeline.set_random_state(np.random.default_rng(seed), Random(seed))


def check_augmentation(level: str | Mapping[str, Any], size: int, with_masks: bool) -> None:
    """Raise a UserError if a pipeline from a file does not load, or changes the kind of an image.

    Args:
        size: side of the images, pixels.
        with_masks: whether masks are augmented with their images.
    """
    if isinstance(level, str):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # training builds the pipeline again, and warns
            _try_file(level, size, with_masks)
    except Exception as error:  # transforms raise exceptions of any type
        reason = first_line(error).rstrip(".")
        if isinstance(error, KeyError):
            reason = f"albumentations {A.__version__} has no {reason}"
        raise UserError(
            f"the pipeline of --augmentation cannot be used ({reason}); save one with "
            "albumentations.save(Compose([...]), file) that keeps images uint8 "
            f"[{size}, {size}, 3]{' and masks their size and values' if with_masks else ''}"
        ) from error


def _try_file(level: Mapping[str, Any], size: int, with_masks: bool) -> None:
    """Build a pipeline and try it. Raise exceptions of any type."""
    pipeline = A.from_dict(dict(level))
    # A transform that is rarely applied would otherwise fail in the middle of a run.
    eager = A.from_dict(always_applied(level))
    if not isinstance(pipeline, A.Compose):
        raise TypeError(f"it is {type(pipeline).__name__}, not Compose")
    for tried in (pipeline, eager):
        try_pipeline(tried, size, with_masks)


def always_applied(value: Any) -> Any:
    """Return a serialised pipeline in which every probability is 1."""
    if isinstance(value, Mapping):
        return {key: 1.0 if key == "p" else always_applied(item) for key, item in value.items()}
    return [always_applied(item) for item in value] if isinstance(value, list) else value


def try_pipeline(pipeline: Any, size: int, with_masks: bool) -> None:
    """Augment images of noise. Raise a TypeError if one changes its type, shape or range."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"image": (size, size, 3)}
    if with_masks:
        shapes["mask"] = (size, size)
    for seed in range(NUM_TRIALS):
        pixels = {"image": random.integers(0, 256, (size, size, 3), dtype=np.uint8)}
        if with_masks:
            pixels["mask"] = random.integers(0, 2, (size, size), dtype=np.uint8)
        seed_augmentation(pipeline, seed)
        augmented = pipeline(**pixels)
        for name, shape in shapes.items():
            result = augmented[name]
            if result.dtype != np.uint8 or result.shape != shape:
                raise TypeError(f"it turns the {name} into {result.dtype} {list(result.shape)}")
        if with_masks and augmented["mask"].max() > 1:
            raise TypeError("it writes other values than 0 and 1 into a mask")
