"""The notebook's cell, with a stand-in for the bundle's script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infer.submission.kaggle import CELL

WRITE = "from pathlib import Path; Path('submission.csv').write_text('isic_id,target');"


def run_cell(folder: Path, places: list[str], script: str) -> subprocess.CompletedProcess[str]:
    """Run the cell in `folder`, with bundles at these places below Kaggle's inputs."""
    inputs = folder / "input"
    inputs.mkdir()
    for place in places:
        (inputs / place).mkdir(parents=True)
        (inputs / place / "bundle.json").write_text("{}")
        (inputs / place / "submit.py").write_text(script)
    return subprocess.run(
        [sys.executable, "-c", CELL],
        cwd=folder,
        env={**os.environ, "KAGGLE_INPUT": str(inputs)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("place", ["bundle", "datasets/owner/bundle", "datasets/owner/b/1/bundle"])
def test_the_bundle_is_found_at_any_depth(place: str, tmp_path: Path) -> None:
    ended = run_cell(tmp_path, [place], WRITE)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_a_killed_run_does_not_lose_the_submission_that_is_there(tmp_path: Path) -> None:
    ended = run_cell(tmp_path, ["bundle"], WRITE + "import os; os.kill(os.getpid(), 9)")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "submit.py ended with exit code -9; the submission so far stays\n"


def test_a_run_without_a_submission_fails(tmp_path: Path) -> None:
    ended = run_cell(tmp_path, ["bundle"], "raise SystemExit(2)")
    assert ended.returncode == 1
    assert "no submission: submit.py ended with exit code 2" in ended.stderr


@pytest.mark.parametrize("places", [[], ["one", "two"]])
def test_another_number_of_bundles_than_one_is_refused(places: list[str], tmp_path: Path) -> None:
    ended = run_cell(tmp_path, places, WRITE)
    assert f"needs one bundle and has {len(places)}" in ended.stderr
    assert not (tmp_path / "submission.csv").exists()
