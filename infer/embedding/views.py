"""Test-time augmentation: what an engine says of an image, averaged over flips and quarter turns of it."""

from collections.abc import Mapping

import numpy as np

from infer.engines import Engine, Outputs
from isic.preprocess import Pixels

VIEWS: dict[str, tuple[tuple[int, bool], ...]] = {
    "none": ((0, False),),
    "flips": ((0, False), (0, True), (2, True), (2, False)),
    "d4": tuple((turns, mirrored) for mirrored in (False, True) for turns in range(4)),
}
"""Quarter turns, and whether left and right change places afterwards. Each is a group, so that the average is the
same for an image and its views."""


def view(images: Pixels, turns: int, mirrored: bool) -> Pixels:
    """Returns images uint8 [N, size, size, 3] turned and mirrored, contiguous; the same memory for no change."""
    turned = np.rot90(images, turns, axes=(1, 2))
    return np.ascontiguousarray(turned[:, :, ::-1] if mirrored else turned)


def averaged(engines: Mapping[int, Engine], images: Pixels, tta: str) -> dict[int, Outputs]:
    """Runs every engine on every view of images uint8 [N, size, size, 3].

    Returns:
        By fold the means over the views in float32: features [N, D] and logits [N, 1].
    """
    sums: dict[int, Outputs] = {}
    for turns, mirrored in VIEWS[tta]:
        seen = view(images, turns, mirrored)
        for fold, engine in engines.items():
            features, logits = engine.run(seen)
            if fold in sums:
                features, logits = sums[fold][0] + features, sums[fold][1] + logits
            sums[fold] = features, logits
    scale = np.float32(1 / len(VIEWS[tta]))  # a power of two: exact
    return {fold: (features * scale, logits * scale) for fold, (features, logits) in sums.items()}
