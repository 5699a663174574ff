from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.untrained import create_untrained, least_cosine
from tests.support.commands import TINY_YAML


def test_the_least_cosine_counts() -> None:
    left, right = np.eye(2, dtype=np.float32), np.array([[1, 0], [1, 1]], np.float32)
    assert least_cosine(left, right) == pytest.approx(0.5**0.5)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A config of a network that runs in a millisecond."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_YAML)
    return path


def test_untrained_networks_are_the_same_every_time(tiny: Path) -> None:
    first, second = (create_untrained(str(tiny)).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
