from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks.networks import summarise_costs, write_networks
from benchmarks.tabular import write_synthetic_table
from infer.ensemble.images.features import fit_images
from isic.metadata import read_metadata
from tests.support.commands import Cli, split_flags


@pytest.mark.slow
def test_every_feature_set_has_its_columns_and_costs(tmp_path: Path, cli: Cli) -> None:
    flags = split_flags("--rows 400 --networks 2 --width 5 --repeats 1")
    ended = cli("benchmarks", "networks", *flags, "--results", tmp_path)
    assert ended.code == 0, ended.err
    rows = pl.read_csv(tmp_path / "networks.csv")
    assert rows["features"].to_list() == ["engineered", "multimodal", "multimodal+aligned"]
    assert rows["columns"].to_list() == [200, 204, 214]
    assert (rows["cpu_seconds"] >= 0).all()
    assert (rows["peak_mb"] > 50).all()


def test_random_embeddings_are_read_as_features(tmp_path: Path) -> None:
    table = write_synthetic_table(tmp_path, 400)
    roots = write_networks(tmp_path, table, 2, 5)
    _, images = fit_images(("image", "aligned"), roots, (), read_metadata(table))
    scores, *aligned = images.tables()
    assert scores.width == 4
    assert [part.width for part in aligned] == [5, 5]
    assert np.isfinite(aligned[1].to_numpy()).all()


def test_costs_are_medians_and_the_largest_peak() -> None:
    costs = [
        {"columns": 3, "seconds": seconds, "cpu_seconds": 2 * seconds, "peak_mb": peak}
        for seconds, peak in ((3.0, 7), (1.0, 9), (2.0, 8))
    ]
    assert summarise_costs(costs) == {
        "columns": 3,
        "seconds": 2.0,
        "cpu_seconds": 4.0,
        "peak_mb": 9,
    }
