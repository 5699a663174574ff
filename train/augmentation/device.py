"""Augmentation of a batch on the device: the levels `light` and `medium` without albumentations.

Each image's parameters depend on its own seed only, so a result does not depend on the size of the
batch, on the number of processes or on a resume. kornia draws the parameters of a batch from one
generator, in numbers that depend on how many of its images are changed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from train.augmentation.levels import DEVICE_STEPS, LEVELS, Step
from train.batch import Batch

PARAMETERS = {
    "SquareSymmetry": (),
    "RandomBrightnessContrast": ("contrast_limit", "brightness_limit"),
    "HueSaturationValue": ("hue_shift_limit", "sat_shift_limit", "val_shift_limit"),
    # Both axes have a scale and a shift of their own.
    "Affine": ("scale", "scale", "rotate", "translate_percent", "translate_percent"),
}
"""The ranges in a step's options that a value is drawn from, in the order of `Values`."""
NEUTRAL = {"scale": 1.0}
"""Values that change nothing, if not 0."""
SYMMETRIES = tuple(
    matrix
    for x in (1.0, -1.0)
    for y in (1.0, -1.0)
    for matrix in (((x, 0.0), (0.0, y)), ((0.0, x), (y, 0.0)))
)
"""The eight matrices that map a square onto itself; the first changes nothing."""
HSV = "HueSaturationValue"
HSV_OFFSETS = (5.0, 3.0, 1.0)
"""Sextants between the hue and the place in the curve that red, green and blue follow."""
MASK_32 = 0xFFFFFFFF
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
"""Of https://nullprogram.com/blog/2018/07/31/, the hash `lowbias32`."""
GOLDEN_RATIO = 0x9E3779B9
"""2**32 divided by the golden ratio: the numbers of one seed are far apart."""


class Values(NamedTuple):
    """The parameters of N images, [N] float32 each."""

    contrast: Tensor
    """Added to the factor 1 of all grey values."""
    brightness: Tensor
    """Added to all grey values, as a share of 255."""
    hue: Tensor
    """Shift in half degrees, as OpenCV measures hue in uint8."""
    saturation: Tensor
    """Shift, of 255."""
    value: Tensor
    """Shift, of 255."""
    scale_x: Tensor
    scale_y: Tensor
    degrees: Tensor
    """Counter-clockwise."""
    shift_x: Tensor
    """As a share of the width."""
    shift_y: Tensor
    symmetry: Tensor
    """int64, index in SYMMETRIES."""


class DeviceAugmentation:
    """Augments the images and masks of batches on a device, as a level describes."""

    def __init__(self, steps: Sequence[Step], device: torch.device) -> None:
        """Prepare the ranges.

        Args:
            steps: with names in DEVICE_STEPS, in their order.
        """
        given = {step.name: step for step in steps}
        ranges, chances = [], []
        for name in DEVICE_STEPS:
            step = given.get(name)
            for key in PARAMETERS[name]:
                neutral = NEUTRAL.get(key, 0.0)
                low, high = step.options[key] if step else (neutral, neutral)
                ranges.append((low, high - low, neutral))
                # All values of a step are drawn or none.
                chances.append((step.p if step else 0.0, DEVICE_STEPS.index(name)))
        self.low, self.span, self.neutral = torch.tensor(ranges, device=device).T
        p, gates = zip(*chances, strict=True)
        self.p = torch.tensor(p, device=device)
        self.gates = torch.tensor(gates, device=device)
        self.symmetries = torch.tensor(SYMMETRIES, device=device)
        self.p_symmetry = given["SquareSymmetry"].p if "SquareSymmetry" in given else 0.0
        self.offsets = torch.tensor(HSV_OFFSETS, device=device) if HSV in given else None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with images uint8 [N, size, size, 3] and masks augmented."""
        values = self.draw(batch.seeds)
        pixels = batch.images.permute(0, 3, 1, 2)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        pixels = change_contrast(pixels, values.contrast, values.brightness)
        if self.offsets is not None:
            pixels = shift_hsv(pixels, values.hue, values.saturation, values.value, self.offsets)
        grid = sampling_grid(values, self.symmetries, size=pixels.shape[-1])
        pixels = warp(pixels, grid, "bilinear").round_()
        images = pixels.to(torch.uint8, memory_format=torch.channels_last).permute(0, 2, 3, 1)
        masks = batch.masks
        if masks.numel():
            masks = warp(masks[:, None].float(), grid, "nearest")[:, 0].to(torch.uint8)
        return batch._replace(images=images, masks=masks)

    def draw(self, seeds: Tensor) -> Values:
        """Return the parameters of images with seeds [N]."""
        num_gates = len(DEVICE_STEPS)
        uniform = hashed_uniforms(seeds, num_gates + len(self.low) + 1)
        is_applied = uniform[:, self.gates] < self.p
        drawn = self.low + self.span * uniform[:, num_gates:-1]
        values = torch.where(is_applied, drawn, self.neutral)
        symmetry = (uniform[:, -1] * len(SYMMETRIES)).long() * (uniform[:, 0] < self.p_symmetry)
        return Values._make((*values.unbind(1), symmetry))


def create_device_augmentation(
    level: object, place: str, device: torch.device
) -> Callable[[Batch], Batch]:
    """Return a function that augments a batch on the device, or returns it as it is.

    Args:
        level: one of DEVICE_LEVELS if the place is `device`.
        place: `device`, or anything else for no augmentation here.
    """
    if place != "device":
        return lambda batch: batch
    return DeviceAugmentation(LEVELS[str(level)], device)


def hashed_uniforms(seeds: Tensor, number: int) -> Tensor:
    """Return float32 [N, number], uniform in [0, 1): a hash of each seed and 0 to number - 1.

    Args:
        seeds: int64 [N], 0 to 2**32 - 1.
    """
    counters = torch.arange(1, number + 1, device=seeds.device) * GOLDEN_RATIO
    # The seeds are hashed as well, since those of two images may differ by such a counter.
    hashed = hash_32((hash_32(seeds)[:, None] + counters) & MASK_32)
    return (hashed >> 8).float() * 2.0**-24  # float32 holds 24 bits


def hash_32(numbers: Tensor) -> Tensor:
    """Return a hash of int64 numbers in the range of uint32, in which it is."""
    for shift, multiplier in zip((16, 15), MULTIPLIERS, strict=True):
        numbers = (numbers ^ (numbers >> shift)) * multiplier & MASK_32
    return numbers ^ (numbers >> 16)


def change_contrast(pixels: Tensor, contrast: Tensor, brightness: Tensor) -> Tensor:
    """Return pixels [N, C, H, W] in [0, 255] after a linear function of each image."""
    factor = (1 + contrast).view(-1, 1, 1, 1)
    changed = torch.addcmul((255 * brightness).view(-1, 1, 1, 1), pixels, factor)
    return changed.clamp_(0, 255).trunc_()  # as albumentations rounds


def shift_hsv(
    pixels: Tensor, hue: Tensor, saturation: Tensor, value: Tensor, offsets: Tensor
) -> Tensor:
    """Return RGB pixels [N, 3, H, W] after shifts of hue, saturation and value, as in `Values`.

    Grey stays grey. Formulas: https://en.wikipedia.org/wiki/HSL_and_HSV

    Args:
        pixels: whole numbers in [0, 255], float32.
        offsets: HSV_OFFSETS on the device.
    """
    red, green, blue = pixels.unbind(1)
    largest = pixels.amax(1)
    chroma = largest - pixels.amin(1)
    divisor = chroma.clamp(min=1)
    sextant = torch.where(
        largest == red,
        (green - blue) / divisor,
        torch.where(largest == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    # Shifts are whole numbers, as albumentations rounds them.
    sextant += (hue.floor() / 30).view(-1, 1, 1)
    share = chroma / largest.clamp(min=1) + (saturation.trunc() / 255).view(-1, 1, 1)
    share = share.clamp_(0, 1) * (chroma > 0)
    largest = (largest + value.trunc().view(-1, 1, 1)).clamp_(0, 255)
    position = (sextant[:, None] + offsets.view(3, 1, 1)) % 6
    falls = torch.minimum(position, 4 - position).clamp_(0, 1)
    return largest[:, None] - (largest * share)[:, None] * falls


def sampling_grid(values: Values, symmetries: Tensor, size: int) -> Tensor:
    """Return the place in the image before that each pixel comes from, [N, size, size, 2].

    Args:
        symmetries: [8, 2, 2].

    The units are those of grid_sample: -1 and 1 are the centres of the outer pixels.
    """
    radians = torch.deg2rad(values.degrees)
    cos, sin = radians.cos(), radians.sin()
    rows = [(cos / values.scale_x, -sin / values.scale_x)]
    rows += [(sin / values.scale_y, cos / values.scale_y)]
    inverse = torch.stack([torch.stack(row, 1) for row in rows], 1)
    shift = torch.stack([values.shift_x, values.shift_y], 1)
    shift = (shift * size).trunc_() * (2 / (size - 1))  # whole pixels, as albumentations
    # Products of elements, because those of matrices on a GPU may be of TF32, which is too coarse
    # for pixels; affine_grid has one.
    symmetry = symmetries[values.symmetry]
    matrix = (symmetry[:, :, :, None] * inverse[:, None]).sum(2)
    offset = (matrix * shift[:, None]).sum(2)
    axis = torch.linspace(-1, 1, size, device=offset.device)
    along_x = matrix[:, None, :, 0] * axis[:, None]
    along_y = matrix[:, None, :, 1] * axis[:, None] - offset[:, None]
    return along_x[:, None] + along_y[:, :, None]


def warp(pixels: Tensor, grid: Tensor, mode: str) -> Tensor:
    """Return float32 pixels [N, C, size, size] sampled by a grid, reflected at the border."""
    # With aligned corners it reflects about the outer pixels' centres, as OpenCV's REFLECT_101.
    return grid_sample(pixels, grid, mode, padding_mode="reflection", align_corners=True)
