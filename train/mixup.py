"""Mixup and CutMix of a batch."""

from collections.abc import Callable

import torch
from timm.data import Mixup

from train.batch import Batch


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
        targets = batch.target[:, None]
        if len(batch.aux):
            targets = torch.cat([targets, batch.aux], dim=1)
        mixer.num_classes = targets.shape[1]
        # timm cuts and pastes along the last two axes, so it needs channels first.
        pixels, mixed = mixer(batch.images.float().permute(0, 3, 1, 2), targets)
        return batch._replace(
            images=pixels.permute(0, 2, 3, 1), target=mixed[:, 0], aux=mixed[:, 1:]
        )

    return mix
