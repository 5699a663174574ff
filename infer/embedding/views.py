"""Test-time augmentation: an engine's outputs averaged over flips and quarter turns of an image."""

from collections.abc import Mapping

import numpy as np

from infer.engines import Engine, Outputs
from isic.preprocess import Pixels
from isic.views import VIEWS


def apply_view(images: Pixels, turns: int, mirrored: bool) -> Pixels:
    """Return images uint8 [N, size, size, 3] turned and mirrored, contiguous."""
    turned = np.rot90(images, turns, axes=(1, 2))
    # Engines read the memory as it lies.
    return np.ascontiguousarray(turned[:, :, ::-1] if mirrored else turned)


def run_averaged(engines: Mapping[int, Engine], images: Pixels, tta: str) -> dict[int, Outputs]:
    """Run every engine on every view of images uint8 [N, size, size, 3].

    Returns:
        The float32 means over the views by fold: features [N, D] and logits [N, 1].
    """
    sums: dict[int, Outputs] = {}
    for turns, mirrored in VIEWS[tta]:
        view = apply_view(images, turns, mirrored)
        for fold, engine in engines.items():
            features, logits = engine.run(view)
            features = features.astype(np.float32, copy=False)
            if fold in sums:
                features = sums[fold][0] + features
                logits = sums[fold][1] + logits
            sums[fold] = features, logits
    # A power of two, so the multiplication is exact.
    scale = np.float32(1 / len(VIEWS[tta]))
    return {fold: (features * scale, logits * scale) for fold, (features, logits) in sums.items()}
