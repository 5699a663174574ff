import pytest
import torch

from benchmarks.limits import Limits, Work, count_work, limits
from benchmarks.untrained import create_untrained


class Two(torch.nn.Module):
    """A product and a convolution whose cost is known."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 4, stride=4, bias=False)
        self.linear = torch.nn.Linear(8, 5, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.conv(images.float().permute(0, 3, 1, 2))
        result: torch.Tensor = self.linear(maps.flatten(2).transpose(1, 2).relu())
        return result


def test_work_is_counted_per_image_and_weights_per_batch() -> None:
    work = count_work(Two().eval(), 8)
    patches = 4
    assert work.flops == 2 * patches * (48 * 8 + 8 * 5)
    assert work.weights == 48 * 8 + 8 * 5
    assert work.activations == 8 * 8 * 3 + patches * 8 + patches * 8 + patches * 5
    assert work.bytes_per_image("fp16", 2) == 2 * work.activations + 2 * work.weights / 2


@pytest.mark.parametrize(
    ("config", "gflop"), [("vit_tiny", 2.51), ("convnext_tiny", 8.91), ("eva02_small", 12.28)]
)
def test_flops_are_the_published_ones(config: str, gflop: float) -> None:
    untrained = create_untrained(config)
    work = count_work(untrained.model, untrained.spec.size)
    assert work.flops / 1e9 == pytest.approx(gflop, rel=0.01)


def test_the_slower_of_the_two_limits_binds() -> None:
    work = Work(flops=100.0, activations=10.0, weights=0.0)
    row = Limits(matmul=1000.0, copy=4000.0).of(work, "fp32", 1, 5.0)
    assert row["bound_by"] == "matmul"
    assert row["limit_images_per_second"] == 10
    assert row["of_matmul"] == 0.5
    assert Limits(matmul=1000.0, copy=40.0).of(work, "fp32", 1, 0.5)["bound_by"] == "copy"


@pytest.mark.slow
def test_the_machine_is_measured() -> None:
    measured = limits("cpu", "fp32")
    assert 1e8 < measured.matmul < 1e14
    assert 1e7 < measured.copy < 1e13
