from pathlib import Path

import polars as pl

from benchmarks.few import split_patients
from isic import schema
from tests.support.commands import Cli


def test_groups_hold_every_lesion_once_and_one_patient() -> None:
    ids = [f"ISIC_{i:02d}" for i in range(23)]
    patients = ["a"] * 12 + ["b"] * 10 + ["c"]
    table = pl.DataFrame({schema.ID: ids, schema.PATIENT: patients})
    groups = split_patients(table, 5)
    assert groups[schema.ID].equals(table[schema.ID])
    assert (groups[schema.PATIENT].str.slice(0, 1) == table[schema.PATIENT]).all()
    assert sorted(groups[schema.PATIENT].value_counts()["count"]) == [1, 2, 5, 5, 5, 5]
    assert not groups.equals(split_patients(table, 5, seed=1))


def test_few_lesions_change_only_relative_features(data: Path, cli: Cli) -> None:
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
