"""Fixtures: a dataset of tables, embeddings, and fitted ensembles. Copy them before a change."""

from pathlib import Path

import pytest

from infer.ensemble.fit import fit_ensemble
from infer.ensemble.settings import FitSettings
from tests.support.ensembles import fit_small, write_dataset, write_embeddings

THREE_LIBRARIES = """
features: raw
libraries: lightgbm, xgboost, catboost
weights: 2, 1, 1
seeds: 2
num_folds: 3
num_rounds: 8
catboost: {depth: 3}
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("ensemble") / "data")


@pytest.fixture(scope="session")
def embeddings(data: Path) -> Path:
    return write_embeddings(data.parent / "embeddings" / "tiny", data)


@pytest.fixture(scope="session")
def fitted(data: Path) -> Path:
    """An ensemble of engineered features with two seeds."""
    return fit_small(data, data.parent / "ensemble", features="engineered", seeds=2)


@pytest.fixture(scope="session")
def library_config(data: Path) -> Path:
    """A config file with settings of all libraries."""
    path = data.parent / "three.yaml"
    path.write_text(THREE_LIBRARIES)
    return path


@pytest.fixture(scope="session")
def three_libraries(data: Path, library_config: Path) -> Path:
    """An ensemble of all libraries, fitted with `library_config`."""
    folders = {"data": data, "output_dir": data.parent, "name": "three"}
    return fit_ensemble(FitSettings(config=str(library_config), num_threads=1, **folders))


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `embeddings/tiny`, and ensembles of tables, images and both."""
    root = tmp_path_factory.mktemp("project")
    data = write_dataset(root / "data")
    embeddings = write_embeddings(root / "embeddings" / "tiny", data)
    shared = {"embeddings": embeddings, "num_rounds": 20}
    for features in ("engineered", "raw", "image", "raw,image", "multimodal"):
        fit_small(data, root / "ensemble", features=features, **shared)
    return root
