from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from benchmarks.worker import EngineJob, checked_features, main, write_job
from infer.engines import Outputs
from isic.preprocess import Pixels
from isic.runtime.files import read_json


def test_an_engine_that_fails_has_the_type_of_its_error(tiny: Path, tmp_path: Path) -> None:
    job = EngineJob(
        config=str(tiny),
        engine="eager",
        precision="fp32",
        device="cpu",
        images=str(tmp_path / "absent.npy"),
        batches=[1],
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

        device = "cpu"
        sizes: ClassVar[set[int]] = set()

        def run(self, images: Pixels) -> Outputs:
            self.sizes.add(len(images))
            numbers = images[:, 0, 0, :1].astype(np.float32)
            return numbers, numbers

    engine = Numbered()
    images = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    assert checked_features(engine, images, batch)[:, 0].tolist() == list(range(16))
    assert engine.sizes == {batch}
