import torch

from train.batch import NO_MASK
from train.losses import dice, focal_loss, mask_loss


def test_focal_loss_is_its_formula() -> None:
    logits, target = torch.linspace(-3, 3, 8), torch.tensor([0.0, 1.0] * 4)
    p = torch.sigmoid(logits)
    p_t, alpha_t = torch.where(target == 1, p, 1 - p), torch.where(target == 1, 0.3, 0.7)
    expected = (-alpha_t * (1 - p_t) ** 1.5 * p_t.log()).mean()
    torch.testing.assert_close(focal_loss(logits, target, alpha=0.3, gamma=1.5), expected)


def test_images_without_a_mask_add_nothing_to_the_loss() -> None:
    logits = torch.randn(4, 16, 16, requires_grad=True)
    masks = torch.randint(0, 2, (4, 32, 32), dtype=torch.uint8)
    masks[2:] = NO_MASK
    loss = mask_loss(logits, masks)
    torch.testing.assert_close(loss, mask_loss(logits[:2], masks[:2]))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[:2].abs().sum() > 0
    assert logits.grad[2:].abs().sum() == 0
    assert mask_loss(logits, torch.full_like(masks, NO_MASK)) == 0


def test_dice_is_its_formula() -> None:
    masks = torch.zeros(4, 4, 4, dtype=torch.uint8)
    masks[0, :2] = masks[1, :2] = 1
    masks[3] = NO_MASK
    probabilities = torch.zeros(4, 4, 4)
    probabilities[0, :2] = 1
    probabilities[1, 1:3] = 1
    expected = torch.tensor([1.0, 0.5, 1.0, torch.nan])
    torch.testing.assert_close(dice(probabilities, masks), expected, equal_nan=True)
