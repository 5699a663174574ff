"""The size of model configs."""

from pathlib import Path

import polars as pl
import pytest

from benchmarks import configs as module
from benchmarks.configs import config_row, configs
from benchmarks.settings import ConfigsSettings
from isic.runtime.config import describe_configs


def test_a_row_has_the_figures_of_timm() -> None:
    row = config_row("vit_tiny")
    assert row["network"] == "vit_tiny_patch16_224"
    assert row["size"] == 224
    assert row["features"] == 192
    assert row["parameters_m"] == pytest.approx(5.5, abs=0.1)


def test_every_config_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "config_row", lambda name: {"what": name})
    configs(ConfigsSettings(results=tmp_path))
    assert pl.read_csv(tmp_path / "configs.csv")["what"].to_list() == list(describe_configs())
