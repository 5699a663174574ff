import importlib.util
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import Cli

from benchmarks.fresh import least_cosine
from benchmarks.peers import compare_all


def test_the_same_images_give_the_same_features_everywhere(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text("model: test_vit\npretrained: false\nimage_size: 80\n")  # larger than the images: no antialias
    flags = ["--images", 24, "--batch", 8, "--repeats", 1, "--num_workers", 0, "--device", "cpu"]
    flags += ["--peers", "eager,transformers", "--results", tmp_path]
    ended = cli("benchmarks", "peers", "--config", config, "--data", small_dataset, *flags)
    assert ended.code == 0, ended.err
    eager, transformers = pl.read_csv(tmp_path / "peers.csv").rows(named=True)
    assert eager["peer"] == "timm eager + DataLoader" and eager["cosine"] > 0.9999 and eager["ratio"] > 0
    if importlib.util.find_spec("transformers") is None:
        assert "transformers" in transformers["reason"] and transformers["ratio"] is None


def test_an_unknown_peer_is_a_sentence(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    ended = cli("benchmarks", "peers", "--config", "demo", "--data", small_dataset, "--peers", "keras")
    assert ended.code == 2 and "no peer has" in ended.err


def test_ratios_are_taken_within_each_repeat() -> None:
    rates = {"infer embed, onnx fp32": [10.0, 30.0], "peer": [5.0, 10.0]}
    features = {name: np.ones((2, 3), np.float32) for name in rates}
    (row,) = compare_all(rates, features, {}, ["peer"])
    assert (row["ratio_min"], row["ratio"], row["ratio_max"], row["cosine"]) == (2.0, 2.5, 3.0, 1.0)
    (row,) = compare_all({"infer embed, onnx fp32": [1.0]}, features, {"peer": "is not there"}, ["peer"])
    assert row["reason"] == "is not there"


def test_the_least_cosine_counts() -> None:
    left, right = np.eye(2, dtype=np.float32), np.array([[1, 0], [1, 1]], np.float32)
    assert least_cosine(left, right) == pytest.approx(0.5**0.5)
