"""Configs of small networks, and a dataset without images."""

from pathlib import Path

import numpy as np
import pytest

from isic.synth.rows import draw_rows


@pytest.fixture
def tiny_80(tmp_path: Path) -> Path:
    """A config whose images are larger than those of the dataset, so that PIL never antialiases."""
    path = tmp_path / "tiny.yaml"
    path.write_text("model: test_vit\npretrained: false\nimage_size: 80\n")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset of a training table only."""
    ids = [f"ISIC_{i:07d}" for i in range(400)]
    patients = [f"IP_{i:07d}" for i in range(60)]
    rows = draw_rows(ids, patients, 100, np.random.default_rng(0))
    rows.table.write_csv(tmp_path / "train-metadata.csv")
    return tmp_path
