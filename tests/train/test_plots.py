from pathlib import Path

import polars as pl
import pytest

from train.history import read_history
from train.plots import draw_roc


def test_roc_curves_are_drawn(trained: Path, tmp_path: Path) -> None:
    assert "pooled: pAUC" in (trained / "roc.svg").read_text()
    oof = pl.read_parquet(trained / "fold_0" / "oof.parquet")
    draw_roc(tmp_path / "one.svg", {"fold 0": oof})
    assert ">fold 0: pAUC" in (tmp_path / "one.svg").read_text()


def test_scalars_reach_tensorboard(trained: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "fold_0" / "tensorboard"))
    events.Reload()
    (entry,) = read_history(trained / "fold_0" / "history.jsonl")
    names = {"loss": "loss", "pauc": "pauc", "lr/backbone": "lr_backbone", "lr/head": "lr_head"}
    for scalar, key in names.items():
        assert [event.value for event in events.Scalars(scalar)] == pytest.approx([entry[key]])
