"""Losses and the Dice coefficient of masks: tensors in, tensors out."""

from collections.abc import Callable
from functools import partial

import torch
from timm.loss import AsymmetricLossMultiLabel, BinaryCrossEntropy
from torch import Tensor
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from train.batch import NO_MASK
from train.config import TrainSettings

Loss = Callable[[Tensor, Tensor], Tensor]
"""Returns the mean loss, a float32 scalar, of logits [N] and targets [N] in [0, 1]."""


def create_loss(settings: TrainSettings) -> Loss:
    """Return the loss of the classes that the settings name."""
    smoothing = settings.label_smoothing
    losses: dict[str, Loss] = {
        "focal": partial(focal_loss, alpha=settings.focal_alpha, gamma=settings.focal_gamma),
        "bce": partial(bce_loss, smoothing=smoothing),
        "asl": partial(asymmetric_loss, smoothing=smoothing),
    }
    return losses[settings.loss]


def focal_loss(logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """Mean focal loss of logits [N] and targets [N], in float32.

    Lin et al. 2017, arXiv 1708.02002, eq. 5.
    """
    loss: Tensor = sigmoid_focal_loss(
        logits.float(), target, alpha=alpha, gamma=gamma, reduction="mean"
    )
    return loss


def bce_loss(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Mean binary cross-entropy of logits [N] and targets [N], in float32.

    Args:
        smoothing: how far targets move towards 0.5: 0.1 makes 0 and 1 to 0.05 and 0.95.
    """
    loss: Tensor = BinaryCrossEntropy(smoothing, smooth_dense=True)(logits.float(), target)
    return loss


def asymmetric_loss(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Mean asymmetric loss of logits [N] and targets [N], in float32; smoothing as in `bce_loss`.

    Ridnik et al. 2021, arXiv 2009.14119, with its authors' exponents: 1 for positives, 4 for
    negatives, of which those with a probability under 0.05 have no loss.
    """
    criterion = AsymmetricLossMultiLabel(smoothing=smoothing, reduction="mean")
    loss: Tensor = criterion(logits[:, None], target[:, None])
    return loss


def aux_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy, mean over the targets that an image has, then mean over the images.

    Every image so has the weight that it has in the loss of the classes, however many images have
    targets; without any it is 0.

    Args:
        logits: float [N, K].
        target: float32 [N, K] in [0, 1], NaN for a target that the image does not have.

    Returns:
        A float32 scalar.
    """
    has_target = ~target.isnan()
    # NaN would be in the gradient too, even with a factor of 0.
    known = target.nan_to_num()
    entropy = functional.binary_cross_entropy_with_logits(logits.float(), known, reduction="none")
    num_targets = has_target.sum(dim=1).clamp(min=1)
    loss: Tensor = ((entropy * has_target).sum(dim=1) / num_targets).mean()
    return loss


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice loss, mean over the images with a mask.

    Milletari et al. 2016, arXiv 1606.04797.

    Args:
        logits: float [N, h, w], at the decoder's stride.
        masks: uint8 [N, H, W], 1 on the lesion; NO_MASK for an image without a mask.

    Returns:
        A float32 scalar, 0 if no image has a mask.
    """
    has_mask = (masks[:, 0, 0] != NO_MASK).float()
    logits = logits.float()
    # The fraction of a coarse pixel that the lesion covers.
    height, width = logits.shape[1:]
    coverage = functional.adaptive_avg_pool2d((masks == 1).float(), (height, width))
    entropy = functional.binary_cross_entropy_with_logits(logits, coverage, reduction="none")
    entropy = entropy.mean(dim=(1, 2))
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities * coverage).sum(dim=(1, 2)) + 1
    size = probabilities.sum(dim=(1, 2)) + coverage.sum(dim=(1, 2)) + 1
    soft_dice = overlap / size
    # Without any mask the loss is 0 but stays in the graph: gradient averaging over processes
    # expects a gradient of every weight.
    loss: Tensor = ((entropy + 1 - soft_dice) * has_mask).sum() / has_mask.sum().clamp(min=1)
    return loss


def dice(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Dice coefficient 2|A and B| / (|A| + |B|) per image at its mask's size, 1 if both are empty.

    Args:
        probabilities: [N, h, w]; over 0.5 after interpolation is lesion.
        masks: uint8 [N, H, W], 1 on the lesion; NO_MASK for an image without a mask.

    Returns:
        float32 [N] in [0, 1], NaN for an image without a mask.
    """
    interpolated = functional.interpolate(
        probabilities.float()[:, None], masks.shape[1:], mode="bilinear", align_corners=False
    )
    predicted = interpolated[:, 0] > 0.5
    lesion = masks == 1
    both = (predicted & lesion).sum(dim=(1, 2))
    sizes = predicted.sum(dim=(1, 2)) + lesion.sum(dim=(1, 2))
    overlap = torch.where(sizes > 0, 2 * both / sizes.clamp(min=1), 1.0)
    return torch.where(masks[:, 0, 0] == NO_MASK, torch.nan, overlap)
