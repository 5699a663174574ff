import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from benchmarks import pipeline
from benchmarks.page import read_results
from benchmarks.process import watch_memory
from benchmarks.settings import PipelineSettings
from tests.support.fake_run import FakeRun, make_fake_run


@pytest.fixture
def small(tmp_path: Path) -> FakeRun:
    return make_fake_run(tmp_path, num_images=40)


def test_every_part_has_a_row(
    small: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cv2, "imdecode", cv2.imdecode)  # the stand-ins replace both
    monkeypatch.setattr(cv2, "resize", cv2.resize)
    settings = PipelineSettings(
        data=small.data,
        images=600,
        workers=(4,),
        rates=(3000,),
        seconds=0.2,
        repeats=1,
        results=tmp_path / "results",
    )
    pipeline.pipeline(settings)
    rows = read_results(tmp_path / "results" / "pipeline.csv")
    assert rows["what"].to_list() == [
        "decoding by 4 threads, a sleep",
        "decoding by 4 processes, a sleep",
        "decoding by 4 interpreters of 1 thread, a sleep",
        "decoding by 4 processes, in no time",
        "control thread, 192 features",
        "control thread, 768 features",
        "engine of 3,000 images/s, 4 threads",
        "engine of 3,000 images/s, 4 processes",
    ]
    assert (rows["images_per_second"].cast(float) > 0).all()
    assert (rows["control_us"].cast(float) > 0).all()
    shares = rows["share"].drop_nulls().cast(float)
    assert ((shares > 0) & (shares <= 1)).all()


ALLOCATE = """
import subprocess, sys, time
data = bytearray(60_000_000)
if len(sys.argv) == 1:
    subprocess.run([sys.executable, "-c", sys.stdin.read(), "child"])
else:
    time.sleep(1)
"""


def test_the_memory_of_descendants_is_counted() -> None:
    command = [sys.executable, "-c", ALLOCATE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        process.stdin.write(ALLOCATE)
        process.stdin.close()
        assert 120 < watch_memory(process) < 300
