import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from benchmarks.worker import NUM_INPUTS, EngineJob, batch_rates, checked_features, main, write_job
from infer.engines import IN_FLIGHT, Engine, Outputs
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


class Recording(Engine):
    """An engine whose features are the images' own numbers; it records what it is asked."""

    device = "cpu"
    folds = (0,)

    def __init__(self) -> None:
        self.sizes: set[int] = set()
        self.waiting: list[RecordedPending] = []
        self.most_waiting: list[int] = []
        """The batches in flight at each result."""

    def submit(self, images: Pixels, folds: Iterable[int] | None = None) -> "RecordedPending":
        self.sizes.add(len(images))
        pending = RecordedPending(self, images, images.copy())
        self.waiting.append(pending)
        return pending

    def close(self) -> None:
        assert not self.waiting


@dataclass
class RecordedPending:
    engine: Recording
    images: Pixels = field(repr=False)
    submitted: Pixels = field(repr=False)

    def result(self) -> dict[int, Outputs]:
        assert self.engine.waiting[0] is self, "the oldest first"
        assert (self.images == self.submitted).all(), "unchanged while in flight"
        places = {pending.images.ctypes.data for pending in self.engine.waiting}
        assert len(places) == len(self.engine.waiting), "each has an input of its own"
        self.engine.most_waiting.append(len(self.engine.waiting))
        self.engine.waiting.pop(0)
        numbers = self.images[:, 0, 0, :1].astype(np.float32)
        return {0: (numbers, numbers)}


def numbered(number: int) -> Pixels:
    """Return images whose values are their numbers."""
    return np.arange(number, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)


@pytest.mark.parametrize("batch", [5, 16, 40])
def test_checked_features_come_from_calls_of_the_measured_size(batch: int) -> None:
    engine = Recording()
    assert checked_features(engine, numbered(20), batch)[:, 0].tolist() == list(range(16))
    assert engine.sizes == {batch}


def test_a_rate_is_that_of_a_full_queue_and_a_latency_that_of_single_calls() -> None:
    engine = Recording()
    row = batch_rates(engine, numbered(20), batch=4, num_repeats=2, seconds=1e-4)
    engine.close()
    assert engine.sizes == {4}
    assert row["in_flight"] == IN_FLIGHT < NUM_INPUTS
    assert 0 < row["min"] <= row["images_per_second"] <= row["max"]
    assert row["p50_ms"] <= row["p99_ms"]
    # Two calls of warm-up; twice a full queue that empties at the end; then one at a time.
    runs = "".join(map(str, engine.most_waiting))
    stream = f"{IN_FLIGHT}+" + "".join(map(str, range(IN_FLIGHT - 1, 0, -1)))
    assert re.fullmatch(f"11({stream}){{2}}1{{{row['calls']}}}", runs)
    assert row["one_at_a_time"] > 0
