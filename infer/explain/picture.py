"""Pictures of occlusion maps: the crop, the map on top of it, and the scale of its colours."""

import cv2
import numpy as np
from numpy.typing import NDArray

from isic.preprocess import Pixels

SIDE = 320
"""Side of the crop in a picture, pixels."""
GAP = 12
BAR_WIDTH = 18
LABEL_WIDTH = 92
CAPTION_HEIGHT = 30
PAPER = (255, 255, 255)
INK = (40, 40, 40)
MALIGNANT = (214, 80, 0)
"""Colour of a patch that raises the logit. Orange and blue differ to colour-blind readers too."""
BENIGN = (0, 90, 200)
STRENGTH = 0.8
"""Opacity of the strongest colour."""
GREYS = (110, 235)
"""Darkest and lightest grey below the colours."""
# Otherwise a map of noise would look like one of evidence.
LEAST_SCALE = 0.25
"""Change of the logit that gets the strongest colour if no change of the image is as large."""

Drops = NDArray[np.float32]


def overlay(image: Pixels, drops: Drops) -> Pixels:
    """Return an image uint8 [S, S, 3] in light grey under the colours of its map [7, 7].

    The opacity of a colour grows with the size of the value, up to `scale_of`.
    """
    share = cv2.resize(
        drops / np.float32(scale_of(drops)), image.shape[:2], interpolation=cv2.INTER_LINEAR
    )
    return _blend(_light_grey(image), np.asarray(share, np.float32))


def scale_of(drops: Drops) -> float:
    """Return the value of the strongest colour: the largest size of a value, if not too small."""
    return max(float(np.abs(drops).max()), LEAST_SCALE)


def _light_grey(image: Pixels) -> Pixels:
    """Return the luminance, with its contrast stretched, so that colours look alike on all skin."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    light = np.interp(grey, (grey.min(), grey.max()), GREYS).astype(np.uint8)
    return light[..., None].repeat(3, axis=2)


def _blend(grey: Pixels, share: NDArray[np.float32]) -> Pixels:
    """Colour grey pixels [h, w, 3] by shares [h, w] from -1 to 1."""
    opacity = STRENGTH * np.abs(share)[..., None]
    colour = np.where(share[..., None] > 0, MALIGNANT, BENIGN)
    mixed = (1 - opacity) * grey + opacity * colour
    return np.asarray(mixed.round().clip(0, 255), np.uint8)


def draw(image: Pixels, drops: Drops, caption: str) -> Pixels:
    """Return the crop, the map on top of it and the scale, side by side, uint8 [h, w, 3].

    Args:
        image: uint8 [SIDE, SIDE, 3].
        drops: [7, 7].
        caption: a line of ASCII below.
    """
    width = 2 * SIDE + 4 * GAP + BAR_WIDTH + LABEL_WIDTH
    picture = np.full((SIDE + 2 * GAP + CAPTION_HEIGHT, width, 3), PAPER, np.uint8)
    rows = slice(GAP, GAP + SIDE)
    left = GAP
    for part in (image, overlay(image, drops)):
        picture[rows, left : left + SIDE] = part
        left += SIDE + GAP
    grey = np.full((SIDE, BAR_WIDTH, 3), 200, np.uint8)
    share = np.linspace(1, -1, SIDE, dtype=np.float32)[:, None].repeat(BAR_WIDTH, axis=1)
    picture[rows, left : left + BAR_WIDTH] = _blend(grey, share)
    left += BAR_WIDTH + 6
    scale = scale_of(drops)
    for value, middle in ((scale, 8), (0.0, SIDE // 2), (-scale, SIDE - 8)):
        _write(picture, f"{value:+.2f}" if value else "0", left, GAP + middle + 4)
    _write(picture, "drop of logit", left, GAP + SIDE // 4)
    _write(picture, "if hidden", left, GAP + SIDE // 4 + 18)
    _write(picture, caption, GAP, SIDE + 2 * GAP + 12)
    return picture


def _write(picture: Pixels, text: str, left: int, bottom: int) -> None:
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(picture, text, (left, bottom), font, 0.42, INK, 1, cv2.LINE_AA)
