from pathlib import Path

import pytest
import torch

from tests.support.commands import TINY, Cli, tiny_settings
from train.batch import NO_MASK
from train.losses import aux_loss, create_loss, dice, focal_loss, mask_loss

LOGITS = torch.linspace(-6, 4, 9)
TARGETS = torch.tensor([0.0, 1.0, 0.0] * 3)


def test_focal_loss_is_its_formula() -> None:
    logits, target = torch.linspace(-3, 3, 8), torch.tensor([0.0, 1.0] * 4)
    p = torch.sigmoid(logits)
    p_t, alpha_t = torch.where(target == 1, p, 1 - p), torch.where(target == 1, 0.3, 0.7)
    expected = (-alpha_t * (1 - p_t) ** 1.5 * p_t.log()).mean()
    torch.testing.assert_close(focal_loss(logits, target, alpha=0.3, gamma=1.5), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_losses_with_smoothed_targets_are_their_formulas(
    smoothing: float, dtype: torch.dtype
) -> None:
    target = TARGETS * (1 - smoothing) + smoothing / 2
    p = torch.sigmoid(LOGITS.to(dtype).float())
    entropy = -target * p.log() - (1 - target) * (1 - p).log()
    # Negatives: the probability shifted by 0.05, to the power of 4; positives: to the power of 1.
    shifted = (1 - p + 0.05).clamp(max=1)
    weight = (1 - p * target - shifted * (1 - target)) ** (target + 4 * (1 - target))
    asymmetric = weight * (-target * p.log() - (1 - target) * shifted.log())
    for name, expected in (("bce", entropy), ("asl", asymmetric)):
        loss = create_loss(tiny_settings(loss=name, label_smoothing=smoothing))
        torch.testing.assert_close(loss(LOGITS.to(dtype), TARGETS), expected.mean())


def test_the_focal_loss_is_the_default() -> None:
    loss = create_loss(tiny_settings(focal_alpha=0.3, focal_gamma=1.5))(LOGITS, TARGETS)
    assert torch.equal(loss, focal_loss(LOGITS, TARGETS, alpha=0.3, gamma=1.5))


@pytest.mark.parametrize("name", ["focal", "bce", "asl"])
def test_losses_have_finite_gradients_at_extreme_logits(name: str) -> None:
    logits = torch.tensor([-1e4, 1e4, -1e4, 1e4, 0.0, -0.0], requires_grad=True)
    target = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.3, 1.0])
    loss = create_loss(tiny_settings(loss=name))(logits, target)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("flags", ["--loss bce --label_smoothing 0.1", "--loss asl --mixup 0.3"])
def test_a_run_learns_with_another_loss(
    flags: str, small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    run = ["--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--epochs", 1]
    ended = cli("train", *TINY, *run, "--batch_size", 8, *flags.split())
    assert ended.code == 0, ended.err
    assert f"loss: {flags.split()[1]}\n" in (tmp_path / "tiny/fold_0/config.yaml").read_text()


def test_a_target_that_an_image_lacks_gives_no_gradient() -> None:
    target = torch.tensor([[1, 0, 0.3], [torch.nan, 1, 0], [torch.nan] * 3, [0, torch.nan, 1]])
    logits = torch.randn(4, 3, requires_grad=True)
    loss = aux_loss(logits, target)
    p = torch.sigmoid(logits.detach())
    entropy = -target * p.log() - (1 - target) * (1 - p).log()
    by_image = torch.stack([entropy[0].mean(), entropy[1, 1:].mean(), entropy[3, ::2].mean()])
    torch.testing.assert_close(loss, by_image.sum() / 4)
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad != 0, ~target.isnan())
    none = aux_loss(logits, torch.full_like(target, torch.nan))
    assert none == 0
    assert none.requires_grad, "averaging over processes takes a gradient of every weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_targets_is_in_float32_and_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[-1e4, 1e4], [1e4, -1e4]], dtype=dtype, requires_grad=True)
    loss = aux_loss(logits, torch.tensor([[1.0, 0.0], [1.0, torch.nan]]))
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


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
