from pathlib import Path

import polars as pl
import pytest

from train.plots import draw_roc


def test_roc_curves_are_drawn(trained: Path, tmp_path: Path) -> None:
    assert "pooled: pAUC" in (trained / "roc.svg").read_text()
    oof = pl.read_parquet(trained / "fold_0" / "oof.parquet")
    draw_roc(tmp_path / "one.svg", {"fold 0": oof})
    assert ">fold 0: pAUC" in (tmp_path / "one.svg").read_text()


def test_scalars_reach_tensorboard(trained: Path) -> None:
    pytest.importorskip("tensorboard")
    assert list((trained / "fold_0" / "tensorboard").glob("events.out.tfevents.*"))
