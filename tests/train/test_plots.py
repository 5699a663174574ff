from pathlib import Path

import polars as pl
import pytest

from train.plots import draw_roc


def test_roc_curves_are_drawn(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert (trained / "roc.png").read_bytes().startswith(b"\x89PNG")
    assert draw_roc(
        tmp_path / "one.png", {"fold 0": pl.read_parquet(trained / "fold_0" / "oof.parquet")}
    )


def test_scalars_reach_tensorboard(trained: Path) -> None:
    pytest.importorskip("tensorboard")
    assert list((trained / "fold_0" / "tensorboard").glob("events.out.tfevents.*"))
