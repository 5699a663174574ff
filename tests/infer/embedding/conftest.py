"""Fixtures: a small run of null engines, and its embeddings."""

from pathlib import Path

import pytest

from tests.support.fake_run import FakeRun, make_fake_run


@pytest.fixture(scope="session")
def fake_run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    """300 images and three folds. Copy it before a change."""
    return make_fake_run(tmp_path_factory.mktemp("fake-run"))


@pytest.fixture(scope="session")
def whole(fake_run: FakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embeddings of an undisturbed run."""
    output = tmp_path_factory.mktemp("whole")
    ended = fake_run.run(output)
    assert ended.returncode == 0, ended.stderr
    return output / "null"
