from pathlib import Path

import numpy as np
import pytest

from benchmarks.eager import EagerEngine
from benchmarks.untrained import create_untrained, example_images, least_cosine


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_network_gives_float32_in_every_precision(tiny: Path, precision: str) -> None:
    images = example_images(None, create_untrained(str(tiny)).spec, 2)
    expected, _ = EagerEngine(str(tiny), "eager", "fp32", "cpu").run(images)
    features, logits = EagerEngine(str(tiny), "eager", precision, "cpu").run(images)
    assert features.dtype == np.float32
    assert logits.dtype == np.float32
    assert least_cosine(expected, features) > 0.999
    assert np.array_equal(expected, features) == (precision == "fp32")
