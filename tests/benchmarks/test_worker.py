from pathlib import Path

import numpy as np
import pytest

from benchmarks.worker import Job, checked_features, main, write_job
from infer.engines import Outputs
from isic.preprocess import Pixels
from isic.runtime.files import read_json
from tests.support.commands import TINY_YAML


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A config of a network that runs in a millisecond."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_YAML)
    return path


def test_an_engine_that_ends_in_an_error_says_its_type(tiny: Path, tmp_path: Path) -> None:
    job = Job(
        str(tiny),
        "eager",
        "fp32",
        "cpu",
        str(tmp_path / "absent.npy"),
        [1],
        repeats=1,
        seconds=0.01,
    )
    write_job(job, tmp_path / "job.json")
    main(tmp_path / "job.json")
    assert read_json(tmp_path / "job.result")["reason"].startswith("FileNotFoundError: ")


@pytest.mark.parametrize("batch", [5, 16, 40])
def test_checked_features_come_from_calls_of_the_measured_size(batch: int) -> None:
    class Numbered:
        """An engine whose features are the images' own numbers."""

        device, sizes = "cpu", set[int]()

        def run(self, images: Pixels) -> Outputs:
            self.sizes.add(len(images))
            numbers = images[:, 0, 0, :1].astype(np.float32)
            return numbers, numbers

    engine, images = (
        Numbered(),
        np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3),
    )
    assert checked_features(engine, images, batch)[:, 0].tolist() == list(range(16))
    assert engine.sizes == {batch}
