from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks.few import split_patients
from isic import schema
from isic.synth.rows import draw_rows
from tests.support.commands import Cli


@pytest.fixture
def data(tmp_path: Path) -> Path:
    ids, patients = [f"ISIC_{i:07d}" for i in range(400)], [f"IP_{i:07d}" for i in range(60)]
    rows = draw_rows(ids, patients, 100, np.random.default_rng(0))
    rows.table.write_csv(tmp_path / "train-metadata.csv")
    return tmp_path


def test_groups_hold_every_lesion_once_and_one_patient() -> None:
    table = pl.DataFrame(
        {
            schema.ID: [f"ISIC_{i:02d}" for i in range(23)],
            schema.PATIENT: ["a"] * 12 + ["b"] * 10 + ["c"],
        }
    )
    groups = split_patients(table, 5)
    assert groups[schema.ID].equals(table[schema.ID])
    assert (groups[schema.PATIENT].str.slice(0, 1) == table[schema.PATIENT]).all()
    assert sorted(groups[schema.PATIENT].value_counts()["count"]) == [1, 2, 5, 5, 5, 5]
    assert not groups.equals(split_patients(table, 5, seed=1))


def test_few_lesions_change_relative_features_alone(data: Path, cli: Cli) -> None:
    flags = ["--data", data, "--label", "synthetic", "--sizes", "1,5", "--results", data / "r"]
    ended = cli("benchmarks", "few", *flags, "--num_folds", 3, "--seeds", 2, "--draws", 100)
    assert ended.code == 0, ended.err
    rows = pl.read_csv(data / "r" / "few.csv", infer_schema=False)
    raw, engineered = rows.partition_by("features", maintain_order=True)
    assert raw["lesions_together"].to_list() == ["1", "5", "all"]
    assert raw["pauc"].n_unique() == 1
    assert raw["verdict"].null_count() == 3
    assert engineered["pauc"].n_unique() == 3
    assert engineered["verdict"].null_count() == 0
