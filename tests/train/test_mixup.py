import numpy as np
import torch

from train.batch import Batch
from train.mixup import create_mixup


def test_mixing_mixes_images_and_targets_alike() -> None:
    np.random.seed(0)  # noqa: NPY002 - timm's Mixup draws here
    target = torch.tensor([0.0, 1.0, 0.0, 0.0])
    images = (target * 200).to(torch.uint8).view(4, 1, 1, 1).expand(4, 32, 32, 3)
    aux = torch.stack([1 - target, target, torch.tensor([1, 0, 0, torch.nan])], dim=1)
    mixed = create_mixup(1.0, 1.0)(Batch(images, target, torch.arange(4), aux=aux))
    torch.testing.assert_close(mixed.aux[:, 0], 1 - mixed.target)
    assert torch.equal(mixed.aux[:, 1], mixed.target)
    # Row 0 is mixed with row 3, which has no target.
    assert mixed.aux[:, 2].isnan().tolist() == [True, False, False, True]
    np.random.seed(0)  # noqa: NPY002
    without = create_mixup(1.0, 1.0)(Batch(images, target, torch.arange(4)))
    assert torch.equal(without.images, mixed.images)
    assert torch.equal(without.target, mixed.target)
    assert mixed.images.shape == images.shape
    assert 0 < mixed.target[1] < 1
    torch.testing.assert_close(
        mixed.images.mean(dim=(1, 2, 3)) / 200, mixed.target, atol=0.01, rtol=0
    )
