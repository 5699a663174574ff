import numpy as np
import torch

from train.batch import Batch
from train.mixup import create_mixup


def test_mixing_mixes_images_and_targets_alike() -> None:
    np.random.seed(0)  # noqa: NPY002 - timm's Mixup draws here
    target = torch.tensor([0.0, 1.0, 0.0, 0.0])
    images = (target * 200).to(torch.uint8).view(4, 1, 1, 1).expand(4, 32, 32, 3)
    mixed = create_mixup(1.0, 1.0)(Batch(images, target, torch.arange(4)))
    assert mixed.images.shape == images.shape
    assert 0 < mixed.target[1] < 1
    torch.testing.assert_close(
        mixed.images.mean(dim=(1, 2, 3)) / 200, mixed.target, atol=0.01, rtol=0
    )
