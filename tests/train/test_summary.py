from pathlib import Path

import polars as pl
import pytest

from isic.layout import OOF_FILE, fold_dir
from train.summary import print_scores


def write_oof(run: Path, fold: int, logits: list[float], **columns: list[float | None]) -> None:
    fold_dir(run, fold).mkdir(parents=True)
    table = pl.DataFrame({"target": [0, 0, 1, 1], "logit": logits, **columns})
    folds = pl.lit(fold, dtype=pl.Int8).alias("fold")
    table.with_columns(folds).write_parquet(fold_dir(run, fold) / OOF_FILE)


def test_the_table_has_a_line_per_fold_their_mean_and_the_pooled_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_oof(tmp_path, 0, [0.0, 1.0, 2.0, 3.0])
    write_oof(tmp_path, 2, [8.0, 7.0, 6.0, 9.0], dice=[None, None, 0.5, 0.7])
    print_scores(tmp_path, num_folds=3)
    _, title, *table = capsys.readouterr().out.splitlines()
    assert title == "scores of best_model.pth on all held-out rows"
    lines = [[], *map(str.split, table)]
    assert lines[1] == ["fold", "rows", "positive", "pAUC", "AUC", "Dice"]
    assert lines[2] == ["0", "4", "2", "0.2000", "1.0000", "-"]
    assert lines[3][:3] == ["2", "4", "2"]
    assert lines[3][4:] == ["0.5000", "0.6000"]
    assert lines[4][0] == "mean"
    assert lines[4][2:] == ["0.7500", "0.6000"]
    assert lines[5][:3] == ["pooled", "8", "4"]


def test_a_run_without_scores_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_scores(tmp_path, num_folds=2)
    assert capsys.readouterr().out == ""
