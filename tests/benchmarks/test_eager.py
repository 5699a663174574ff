from pathlib import Path

import numpy as np
import pytest

from benchmarks.eager import eager_engine
from benchmarks.untrained import create_untrained, example_images, least_cosine


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_network_gives_float32_in_every_precision(tiny: Path, precision: str) -> None:
    images = example_images(None, create_untrained(str(tiny)).spec, 2)
    expected, _ = eager_engine(str(tiny), "eager", "fp32", "cpu", 16).run(images)
    features, logits = eager_engine(str(tiny), "eager", precision, "cpu", 16).run(images)
    assert features.dtype == np.float32
    assert logits.dtype == np.float32
    assert least_cosine(expected, features) > 0.999
    assert np.array_equal(expected, features) == (precision == "fp32")
