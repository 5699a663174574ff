from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.untrained import create_untrained, least_cosine


def test_the_least_cosine_counts() -> None:
    left = np.eye(2, dtype=np.float32)
    right = np.array([[1, 0], [1, 1]], np.float32)
    assert least_cosine(left, right) == pytest.approx(0.5**0.5)


def test_untrained_networks_are_the_same_every_time(tiny: Path) -> None:
    first = create_untrained(str(tiny)).model.state_dict()
    second = create_untrained(str(tiny)).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
