from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks.peers import (
    OURS,
    BaselineProcess,
    PeersSettings,
    build_ours,
    by_peer_precision,
    compare_all,
    describe,
    embed_in_turns,
    write_resized,
)
from benchmarks.untrained import create_untrained
from infer.engines import unavailable_reason
from isic.dataset import Dataset
from isic.preprocess import PreprocessSpec, decode, resize
from tests.support.commands import Cli


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A config whose images are larger than those of the dataset, so that no way antialiases."""
    path = tmp_path / "tiny.yaml"
    path.write_text("model: test_vit\npretrained: false\nimage_size: 80\n")
    return path


def test_the_same_images_give_the_same_features_everywhere(
    tiny: Path, small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ["--images", 24, "--batch", 8, "--repeats", 1, "--num_workers", 0, "--device", "cpu"]
    flags += ["--peers", "eager", "--results", tmp_path]
    ended = cli("benchmarks", "peers", "--config", tiny, "--data", small_dataset, *flags)
    assert ended.code == 0, ended.err
    (eager,) = pl.read_csv(tmp_path / "peers.csv").rows(named=True)
    assert eager["peer"] == "timm eager + DataLoader"
    assert eager["ratio"] > 0
    assert eager["ours"].endswith("onnx fp32")
    assert eager["peer_precision"] == "fp32"
    assert eager["cosine_same_pixels"] > 0.99999
    assert eager["cosine"] > 0.9999


def test_an_engine_that_does_not_open_costs_its_rows_only(
    tiny: Path, small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    if unavailable_reason("aoti", "cuda") is None:
        pytest.skip("there is a GPU here")
    flags = [
        "--images",
        8,
        "--repeats",
        1,
        "--device",
        "cuda",
        "--peers",
        "eager",
        "--results",
        tmp_path,
    ]
    ended = cli("benchmarks", "peers", "--config", tiny, "--data", small_dataset, *flags)
    assert ended.code == 0, ended.err
    (row,) = pl.read_csv(tmp_path / "peers.csv").to_dicts()
    assert "ONNX Runtime does not run on --device cuda here" in row["reason"], (
        "not that its first run failed"
    )


def test_a_way_that_fails_in_its_turn_is_left_out(
    tiny: Path, small_dataset: Path, tmp_path: Path
) -> None:
    settings = PeersSettings(config=str(tiny), data=small_dataset, batch=2, device="cpu")
    untrained, ids = (
        create_untrained(str(tiny)),
        Dataset(small_dataset).metadata("train")["isic_id"].to_list()[:2],
    )
    common = describe(untrained, ids, settings, tmp_path)
    ours, reasons = build_ours(untrained, common, settings, ["fp32"], tmp_path)
    ways = {name: BaselineProcess(task) for name, task in ours.items()}
    rates, features = embed_in_turns(
        ways, tmp_path / "absent", tmp_path / "absent", len(ids), repeats=1
    )
    (way,) = ways.values()
    assert not reasons
    assert way.reason
    assert "absent" in way.reason
    assert rates == {f"{OURS}, onnx fp32": []}
    assert features == {
        "cosine": {},
        "cosine_same_pixels": {},
    }


def test_on_a_gpu_the_peers_compute_in_the_precision_of_ours() -> None:
    settings = PeersSettings(precision=("bf16", "int8", "fp16", "fp32"))
    assert by_peer_precision(settings, "cuda") == {
        "bf16": ["bf16"],
        "fp16": ["int8", "fp16"],
        "fp32": ["fp32"],
    }
    assert by_peer_precision(settings, "cpu") == {"fp32": list(settings.precision)}


def test_resized_images_read_back_to_the_very_pixels(small_dataset: Path, tmp_path: Path) -> None:
    dataset, spec = Dataset(small_dataset), PreprocessSpec(size=32)
    ids = dataset.metadata("train")["isic_id"].to_list()[:5]
    again = Dataset(write_resized(dataset, ids, spec, tmp_path))
    for before, after in zip(
        dataset.images("train").read(ids), again.images("train").read(ids), strict=True
    ):
        pixels = decode(after)
        assert (pixels == resize(decode(before), spec)).all()
        assert (resize(pixels, spec) == pixels).all()


def test_an_unknown_peer_is_a_sentence(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    ended = cli(
        "benchmarks", "peers", "--config", "demo", "--data", small_dataset, "--peers", "keras"
    )
    assert ended.code == 2
    assert "no peer has" in ended.err


def test_ratios_are_taken_within_each_repeat() -> None:
    rates = {"infer embed, onnx fp32": [10.0, 30.0], "peer": [5.0, 10.0]}
    features = {name: np.ones((2, 3), np.float32) for name in rates}
    (row,) = compare_all(rates, {"cosine": features}, {}, ["peer"])
    assert (row["ratio_min"], row["ratio"], row["ratio_max"], row["cosine"]) == (2.0, 2.5, 3.0, 1.0)
    (row,) = compare_all(
        {"infer embed, onnx fp32": [1.0]}, {"cosine": features}, {"peer": "is not there"}, ["peer"]
    )
    assert row["reason"] == "is not there"
