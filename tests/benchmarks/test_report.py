from pathlib import Path

import pytest
from conftest import Cli

from benchmarks.record import RESULTS, append
from benchmarks.report import README, with_tables
from isic.errors import UserError


def test_the_readmes_tables_are_the_csvs() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text, RESULTS) == text, "run `python -m benchmarks report`"


def test_the_last_row_of_each_kind_stands_in_the_table(tmp_path: Path, cli: Cli) -> None:
    for seconds in (1, 2):
        append("ingest", [{"what": "a", "seconds": seconds}, {"what": "b", "images_per_second": 5}], tmp_path)
    columns = ["rows", "positives", "pauc_pooled", "pauc_mean_of_folds", "pauc_std_of_folds", "auc_pooled"]
    append("accuracy", [{"what": "m", "data": "d", **dict.fromkeys(columns, 0.5)}], tmp_path)
    append("ingest", [{"what": "a", "seconds": 3, "min": 0, "max": 0, "first_is_faster_by": 1}], tmp_path)
    columns = ["num_features", "pauc", "auc", "difference", "better_in", "p"]
    append("ablation", [{"data": "d", "features": "f", "model": "m", **dict.fromkeys(columns, 0.5)}], tmp_path)
    readme = tmp_path / "README.md"
    marks = "".join(f"<!-- table: {name} -->\nstale\n<!-- end -->\n" for name in ("ingest", "accuracy", "ablation"))
    readme.write_text(f"before\n{marks}after\n")
    ended = cli("benchmarks", "report", "--readme", readme, "--results", tmp_path)
    assert ended.code == 0, ended.err
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert "| a |  | 0 | 0 | 1 | 3 |" in text and "| b | 5 |  |  |  |  |" in text and "| m |" in text


def test_a_table_without_results_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run the benchmark first"):
        with_tables("", tmp_path)
