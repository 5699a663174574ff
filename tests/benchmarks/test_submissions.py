from pathlib import Path

import numpy as np
import polars as pl
import pytest

from isic import schema
from isic.metrics import pauc
from isic.tables import read_csv
from tests.support.commands import Cli


@pytest.fixture
def labels(data: Path) -> pl.DataFrame:
    """Labels of a test split, half of them malignant. Writes its table."""
    train = read_csv(data / "train-metadata.csv")
    train.drop(schema.TRAIN_ONLY).write_csv(data / "test-metadata.csv")
    return train.select(schema.ID, target=pl.int_range(pl.len()) % 2)


def write_submission(path: Path, labels: pl.DataFrame, noise: float) -> Path:
    """Write scores of the labels with noise, in another order of rows."""
    random = np.random.default_rng(0)
    score = labels[schema.TARGET] + noise * random.standard_normal(len(labels))
    labels.with_columns(target=score).sort("target").write_csv(path)
    return path


def test_submissions_are_compared_with_the_first(
    data: Path, labels: pl.DataFrame, tmp_path: Path, cli: Cli
) -> None:
    labels.write_csv(tmp_path / "truth.csv")
    good = write_submission(tmp_path / "good.csv", labels, 0.1)
    poor = write_submission(tmp_path / "poor.csv", labels, 5.0)
    flags = ["--label", "synthetic", "--truth", tmp_path / "truth.csv", "--draws", 100]
    places = ["--data", data, "--submissions", f"{good},{poor}", "--results", tmp_path / "r"]
    ended = cli("benchmarks", "submissions", *flags, *places)
    assert ended.code == 0, ended.err
    first, second = pl.read_csv(tmp_path / "r" / "submissions.csv").iter_rows(named=True)
    assert first["what"] == "good"
    assert first["pauc"] == 0.2
    assert first["difference"] is first["rank_correlation"] is None
    assert second["first"] == "good"
    assert second["positives"] == labels["target"].sum()
    scores = labels.select(schema.ID).join(pl.read_csv(poor), on=schema.ID, maintain_order="left")
    assert second["pauc"] == round(pauc(labels["target"], scores["target"]), 4)
    assert second["pauc_low"] <= second["pauc"] <= second["pauc_high"]
    assert second["high"] < 0
    assert second["verdict"] == "a difference"
    assert -1 < second["rank_correlation"] < 1


def test_a_submission_without_some_rows_is_refused(
    data: Path, labels: pl.DataFrame, tmp_path: Path, cli: Cli
) -> None:
    labels.write_csv(tmp_path / "truth.csv")
    short = write_submission(tmp_path / "short.csv", labels[3:], 1.0)
    flags = ["--data", data, "--label", "x", "--truth", tmp_path / "truth.csv"]
    ended = cli("benchmarks", "submissions", *flags, "--submissions", short, "--results", tmp_path)
    assert ended.code == 2
    assert f"short.csv lacks a number for 3 of the {len(labels)} test rows" in ended.err
    assert not (tmp_path / "submissions.csv").exists()
