import numpy as np
import pytest

from isic.html.plot import path, stairs


def test_paths_have_no_redundant_points() -> None:
    points = np.array([[0, 0], [0, 0.04], [0, 5], [0, 10], [3, 10], [7.26, 10]])
    assert path(points) == "M0 0L0 10L7.3 10"
    x, y = stairs([0, 0.5, 1], [1, 0.8, 0.4])
    assert np.trapezoid(y, x) == pytest.approx(0.5 * 0.8 + 0.5 * 0.4)
