"""Crops rendered from rows: 15 x 15 mm of skin with one lesion, as JPEG and mask."""

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import polars as pl
from numpy.random import Generator
from numpy.typing import NDArray

from isic.preprocess import Pixels
from isic.synth import marginals

Field = NDArray[np.float32]

FIELD_MM = 15.0

VEIL = 1.0
"""Strength of the hidden cue as a blue-white veil over part of the lesion; 0 removes it."""

HALO = 1.0
"""Strength of the hidden cue as a pink ring around the lesion, visible on small lesions too."""

DOTS = 1.0
"""Number of dark dots near the lesion's rim, as a factor of the hidden cue."""

CUE_FROM = 0.0
CUE_TO = 3.0
"""Values of the hidden cue that are invisible and fully visible."""

VEIL_LAB = (10.0, -7.0, -24.0)
HALO_LAB = (1.0, 13.0, -4.0)
DOT_LAB = (-13, -1, -5)
"""Change of L, A and B at full veil, at full halo and in a dot."""

HAIRY = 0.35
NEIGHBOURS = 0.25
GLOSSY = 0.2
"""Shares of the crops with hair, with other small lesions, and with glossy flakes."""

OUTLINE_STEPS = 512
MIN_BYTES = 1_000
MAX_BYTES = 6_400
QUALITIES = (97, 93, 88, 82, 75, 65, 50, 30)
"""JPEG qualities to try; the nearest to the desired file size wins."""


@dataclass(frozen=True)
class Crop:
    jpeg: bytes
    mask: bytes
    """PNG, one channel, 255 in the lesion."""


@dataclass(frozen=True)
class CropSpec:
    """Appearance of one crop, taken from its row."""

    diameter_mm: float
    axis_ratio: float
    inside: Field
    """[3] mean Lab inside the lesion."""
    outside: Field
    """[3] mean Lab of the skin around it."""
    std_l: float
    std_l_outside: float
    color_std: float
    border: float
    asymmetry: float
    angle: float
    """Radians."""
    cue: float
    """Visible strength of the hidden cue, 0 to 1."""


def crop_specs(table: pl.DataFrame, cue: NDArray[np.float64]) -> list[CropSpec]:
    """Return the spec of the crop of each row of `table`, with `cue`: [N] the rows' hidden cue."""
    shown = np.clip((cue - CUE_FROM) / (CUE_TO - CUE_FROM), 0, 1)
    return [
        CropSpec(
            diameter_mm=row["clin_size_long_diam_mm"],
            axis_ratio=row["tbp_lv_minorAxisMM"] / row["clin_size_long_diam_mm"],
            inside=np.array([row[f"tbp_lv_{axis}"] for axis in "LAB"], dtype=np.float32),
            outside=np.array([row[f"tbp_lv_{axis}ext"] for axis in "LAB"], dtype=np.float32),
            std_l=row["tbp_lv_stdL"],
            std_l_outside=row["tbp_lv_stdLExt"],
            color_std=row["tbp_lv_color_std_mean"],
            border=row["tbp_lv_norm_border"],
            asymmetry=row["tbp_lv_symm_2axis"],
            angle=np.radians(row["tbp_lv_symm_2axis_angle"]),
            cue=float(strength),
        )
        for row, strength in zip(table.iter_rows(named=True), shown, strict=True)
    ]


def render(spec: CropSpec, seed: tuple[int, ...]) -> Crop:
    """Render one crop; the same spec and seed give the same bytes."""
    rng = np.random.default_rng(seed)
    side = round(float(np.interp(100 * rng.random(), *marginals.SIDE_PX)))
    depth = _lesion_depth(spec, side, rng)
    lesion = depth > 0
    lab = _skin(spec, side, rng)
    _add_neighbours(lab, spec, rng)
    _paint_lesion(lab, depth, spec, rng)
    _add_hair(lab, rng)
    _add_gloss(lab, depth, rng)
    bgr = cv2.cvtColor(lab, cv2.COLOR_LAB2BGR)
    bgr = cv2.GaussianBlur(bgr, (0, 0), float(rng.uniform(0.3, 0.8)))
    sensor_noise = 0.8 * rng.standard_normal(bgr.shape, dtype=np.float32)
    pixels = np.clip(bgr * 255 + sensor_noise, 0, 255).astype(np.uint8)
    _, mask = cv2.imencode(".png", lesion.astype(np.uint8) * 255)
    return Crop(_jpeg(pixels, rng), mask.tobytes())


@lru_cache(maxsize=256)
def _grid(side: int) -> tuple[Field, Field]:
    """Return x and y of the pixel centres in mm from the field's centre, each [side, side]."""
    # Cached, because many crops have the same side.
    axis = (((np.arange(side) + 0.5) / side - 0.5) * FIELD_MM).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _lesion_depth(spec: CropSpec, side: int, rng: Generator) -> Field:
    """Return each pixel's depth in the lesion, [side, side]: 1 at its centre, 0 on its outline."""
    # The outline is an ellipse whose radius is perturbed by a Fourier series.
    x, y = _grid(side)
    x = x - rng.normal(0, 0.4)
    y = y - rng.normal(0, 0.4)
    cos = math.cos(spec.angle)
    sin = math.sin(spec.angle)
    radius_mm = spec.diameter_mm / 2
    # Coordinates along the axes of the ellipse, in radii.
    u = (x * cos + y * sin) / radius_mm
    v = (y * cos - x * sin) / (radius_mm * spec.axis_ratio)
    steps_per_radian = OUTLINE_STEPS / (2 * np.pi)
    step = (np.arctan2(v, u) * steps_per_radian).astype(np.int32) % OUTLINE_STEPS
    depth = 1 - np.hypot(u, v) / _outline(spec, rng)[step]
    return np.asarray(depth, dtype=np.float32)


def _outline(spec: CropSpec, rng: Generator) -> Field:
    """Return the relative radius, [OUTLINE_STEPS]; its mean square is 1, which keeps the area."""
    order = np.arange(1, 13)
    # High harmonics make a border ragged, odd low ones make it asymmetric.
    ragged = 0.030 * spec.border * (order >= 4) / order
    lopsided = 0.18 * spec.asymmetry * np.isin(order, (1, 3)) / order
    amplitude = ragged + lopsided + 0.012

    angle = np.arange(OUTLINE_STEPS) * (2 * np.pi / OUTLINE_STEPS)
    phase = rng.uniform(0, 2 * np.pi, len(order))
    wave = np.cos(order[:, None] * angle + phase[:, None])
    weight = amplitude * rng.normal(0, 1, len(order))
    radius = np.maximum(1 + weight @ wave, 0.35)
    mean_square = np.mean(radius**2)
    return np.asarray(radius / np.sqrt(mean_square), dtype=np.float32)


def _noise(side: int, sigma: float, rng: Generator, stretch: float = 1.0) -> Field:
    """Return smooth noise [side, side] of mean 0 and variance 1.

    Args:
        sigma: width of the blur in pixels, horizontally times `stretch`.
    """
    # Smooth noise is sampled coarsely and enlarged: a blur with a wide kernel costs far more.
    shrink = max(1, int(sigma // 2))
    size = side // shrink + 2
    white = rng.standard_normal((size, size), dtype=np.float32)
    smooth = cv2.GaussianBlur(white, (0, 0), sigmaX=sigma / shrink * stretch, sigmaY=sigma / shrink)
    if shrink > 1:
        smooth = cv2.resize(smooth, (side, side), interpolation=cv2.INTER_CUBIC)
    smooth = smooth[:side, :side]
    return np.asarray((smooth - smooth.mean()) / (smooth.std() + 1e-6), dtype=np.float32)


def _skin(spec: CropSpec, side: int, rng: Generator) -> Field:
    """Return skin [side, side, 3] in Lab: furrows, grain, redness, uneven light."""
    furrows = _turned(_noise(side, side / 120, rng, stretch=rng.uniform(1.0, 2.4)), rng)
    grain = _noise(side, 0.6, rng)
    blotches = _noise(side, side / 10, rng)
    x, y = _grid(side)
    light = (x * rng.normal() + y * rng.normal()) / FIELD_MM
    texture = 0.7 * furrows + 0.5 * grain + 0.5 * blotches
    lightness = texture * spec.std_l_outside + 3.5 * light
    if rng.random() < 0.15:  # a shadow on one side
        direction = rng.uniform(0, 2 * np.pi)
        distance = (x * math.cos(direction) + y * math.sin(direction)) / (FIELD_MM / 2)
        lightness -= 12 * np.clip(distance - 0.6, 0, None)
    patches = 0.8 * _noise(side, side / 14, rng)
    mottles = 0.6 * _noise(side, side / 45, rng)
    redness = patches + mottles - 0.25 * furrows
    yellowness = 0.7 * _noise(side, side / 14, rng) + 0.3 * furrows
    spread = 0.35 * spec.std_l_outside + 0.4
    variation = np.stack([lightness, redness * spread, yellowness * spread], axis=2)
    return np.asarray(variation + spec.outside, dtype=np.float32)


def _turned(field: Field, rng: Generator) -> Field:
    """Rotate a square field [side, side] by a random angle, mirrored at its edges."""
    side = field.shape[0]
    matrix = cv2.getRotationMatrix2D((side / 2, side / 2), float(rng.uniform(0, 360)), 1.0)
    turned = cv2.warpAffine(field, matrix, (side, side), borderMode=cv2.BORDER_REFLECT)
    return np.asarray(turned, dtype=np.float32)


def _paint_lesion(lab: Field, depth: Field, spec: CropSpec, rng: Generator) -> None:
    """Paint the lesion, in place."""
    softness = np.float32(rng.uniform(0.05, 0.11))
    cover = 1 / (1 + np.exp(-np.clip(depth / softness, -30, 30)))
    pattern = _lesion_pattern(depth, spec, rng)
    ring = np.exp(-(((depth + 0.35) / 0.3) ** 2)) * (1 - cover)
    lab += (HALO * spec.cue * ring)[..., None] * np.array(HALO_LAB, dtype=np.float32)
    skin_left = 0.35 * (lab - spec.outside)  # the furrows continue, fainter, through the lesion
    lab += cover[..., None] * (spec.inside + pattern + skin_left - lab)


def _lesion_pattern(depth: Field, spec: CropSpec, rng: Generator) -> Field:
    """Return differences from the lesion's mean colour, [side, side, 3] in Lab."""
    side = len(depth)
    pattern = np.zeros((side, side, 3), dtype=np.float32)
    darker_centre = 1.6 * rng.uniform(-0.2, 1.0)
    texture = 0.7 * _noise(side, side / 26, rng)
    pattern[..., 0] = spec.std_l * (texture - darker_centre * np.clip(depth, 0, 1))
    for axis in (1, 2):
        pattern[..., axis] = 0.9 * spec.color_std * _noise(side, side / 24, rng)
    pattern += _veil(depth, spec, rng) + _dots(depth, spec, rng)
    lesion = depth > 0
    if lesion.any():
        # The mean colour is that of the row, whatever the hidden cue adds.
        pattern -= pattern[lesion].mean(axis=0)
    return pattern


def _veil(depth: Field, spec: CropSpec, rng: Generator) -> Field:
    side = len(depth)
    x, y = _grid(side)
    direction = rng.uniform(0, 2 * np.pi)
    offset = 0.22 * spec.diameter_mm
    radius = 0.30 * spec.diameter_mm
    center_x = offset * math.cos(direction)
    center_y = offset * math.sin(direction)
    patch = np.exp(-((x - center_x) ** 2 + (y - center_y) ** 2) / radius**2)
    patch = np.where(depth > -0.1, patch, 0)
    patch *= 1 + 0.25 * _noise(side, side / 30, rng)
    veil = (VEIL * spec.cue * patch)[..., None] * np.array(VEIL_LAB, dtype=np.float32)
    return np.asarray(veil, dtype=np.float32)


def _dots(depth: Field, spec: CropSpec, rng: Generator) -> Field:
    """Return dark dots near the rim of the lesion, [side, side, 3] in Lab."""
    side = len(depth)
    canvas = np.zeros((side, side), dtype=np.float32)
    rim_y, rim_x = np.nonzero((depth > 0.05) & (depth < 0.5))
    count = min(rng.poisson(8 * DOTS * spec.cue), len(rim_y))
    for i in rng.permutation(len(rim_y))[:count]:
        radius = max(1, round(side * rng.uniform(0.008, 0.018)))
        centre = (int(rim_x[i]), int(rim_y[i]))
        cv2.circle(canvas, centre, radius, 1.0, thickness=-1)  # filled
    soft = cv2.GaussianBlur(canvas, (0, 0), 0.8)
    dots = soft[..., None] * np.array(DOT_LAB, dtype=np.float32)
    return np.asarray(dots, dtype=np.float32)


def _add_neighbours(lab: Field, spec: CropSpec, rng: Generator) -> None:
    if rng.random() > NEIGHBOURS:
        return
    x, y = _grid(len(lab))
    for _ in range(rng.integers(1, 5)):
        direction = rng.uniform(0, 2 * np.pi)
        offset = rng.uniform(5.5, 9)
        radius = rng.uniform(0.25, 0.8)
        center_x = offset * math.cos(direction)
        center_y = offset * math.sin(direction)
        distance = np.hypot(x - center_x, y - center_y) / radius
        spot = np.exp(-(distance**4)) * rng.uniform(0.3, 0.9)
        lab += spot[..., None] * (spec.inside - spec.outside)


def _add_hair(lab: Field, rng: Generator) -> None:
    """Paint thin curved hairs, in place: mostly dark, roughly parallel."""
    if rng.random() > HAIRY:
        return
    side = len(lab)
    canvas = np.zeros((side, side), dtype=np.uint8)
    direction = rng.uniform(0, np.pi)
    for _ in range(rng.integers(2, 22)):
        heading = direction + rng.normal(0, 0.45) + np.linspace(0, rng.normal(0, 1.2), 12)
        steps = np.stack([np.cos(heading), np.sin(heading)], axis=1)
        steps = steps * rng.uniform(0.3, 1.0) * side / 11
        path = np.cumsum(steps, axis=0) + rng.uniform(-0.2, 1, 2) * side
        eighths = np.round(path * 8).astype(np.int32)  # of a pixel: shift=3
        opacity = int(rng.integers(110, 255))
        cv2.polylines(canvas, [eighths], False, opacity, 1, cv2.LINE_AA, shift=3)
    cover = canvas.astype(np.float32) / 255 * np.float32(rng.uniform(0.35, 0.85))
    lightness = rng.choice([14.0, 22.0, 75.0], p=[0.5, 0.4, 0.1])
    color = np.array((lightness, 4, 6), dtype=np.float32)
    lab += cover[..., None] * (color - lab)


def _add_gloss(lab: Field, depth: Field, rng: Generator) -> None:
    """Paint light flakes on and near the lesion, in place."""
    if rng.random() > GLOSSY:
        return
    noise = _turned(_noise(len(lab), 0.9, rng, stretch=2.5), rng)
    flakes = np.clip(noise - 1.9, 0, None)
    outside = np.clip(-depth, 0, None)
    lab[..., 0] += 14 * flakes * np.exp(-(outside**2))


def _jpeg(pixels: Pixels, rng: Generator) -> bytes:
    """Compress BGR pixels to about the file size of the challenge's crops of the same side."""
    usual = 2_700 * (len(pixels) / 130) ** 1.1 * np.exp(rng.normal(0, 0.17))
    wanted = float(np.clip(usual, MIN_BYTES, MAX_BYTES))
    candidates = []
    for quality in QUALITIES:
        _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
        candidates.append(data.tobytes())
    allowed = [data for data in candidates if MIN_BYTES <= len(data) <= MAX_BYTES]
    return min(allowed or candidates, key=lambda data: abs(len(data) - wanted))
