"""Losses, and the overlap that masks are scored by. Tensors in, tensors out."""

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from train.config import TrainSettings
from train.data import NO_MASK


def focal_loss(logits: Tensor, target: Tensor, settings: TrainSettings) -> Tensor:
    """Mean focal loss (Lin et al. 2017, arXiv 1708.02002, eq. 5) of logits [N] and targets [N], in float32."""
    loss: Tensor = sigmoid_focal_loss(
        logits.float(),
        target,
        alpha=settings.focal_alpha,
        gamma=settings.focal_gamma,
        reduction="mean",
    )
    return loss


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice loss (Milletari et al. 2016, arXiv 1606.04797), mean over images with a mask.

    Images without a mask add nothing, but keep the decoder in the graph, as gradient averaging needs.

    Args:
        logits: float [N, h, w], at the decoder's stride.
        masks: uint8 [N, H, W], 1 in the lesion; NO_MASK where an image has none.

    Returns:
        A float32 scalar, 0 where no image has a mask.
    """
    has_mask = (masks[:, 0, 0] != NO_MASK).float()
    # the share of a coarse pixel that the lesion covers
    covered = functional.adaptive_avg_pool2d(
        (masks == 1).float(), (logits.shape[1], logits.shape[2])
    )
    logits = logits.float()
    entropy = functional.binary_cross_entropy_with_logits(logits, covered, reduction="none").mean(
        dim=(1, 2)
    )
    drawn = logits.sigmoid()
    overlap = 2 * (drawn * covered).sum(dim=(1, 2)) + 1
    soft_dice = overlap / (drawn.sum(dim=(1, 2)) + covered.sum(dim=(1, 2)) + 1)
    loss: Tensor = ((entropy + 1 - soft_dice) * has_mask).sum() / has_mask.sum().clamp(min=1)
    return loss


def dice(drawn: Tensor, masks: Tensor) -> Tensor:
    """Dice coefficient 2|A and B| / (|A| + |B|) of each image at the size of its mask, 1 where both are empty.

    Args:
        drawn: probabilities [N, h, w]; the lesion is where they exceed 0.5 once brought to the mask's size.
        masks: uint8 [N, H, W], 1 in the lesion; NO_MASK where an image has none.

    Returns:
        float32 [N] in [0, 1], NaN for an image without a mask.
    """
    full = functional.interpolate(
        drawn.float()[:, None], masks.shape[1:], mode="bilinear", align_corners=False
    )
    ours, theirs = full[:, 0] > 0.5, masks == 1
    both, sizes = (ours & theirs).sum(dim=(1, 2)), ours.sum(dim=(1, 2)) + theirs.sum(dim=(1, 2))
    overlap = torch.where(sizes > 0, 2 * both / sizes.clamp(min=1), 1.0)
    return torch.where(masks[:, 0, 0] == NO_MASK, torch.nan, overlap)
