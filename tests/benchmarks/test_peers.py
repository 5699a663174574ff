from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks.artifacts import ArtifactStore
from benchmarks.peers import (
    OURS,
    BaselineProcess,
    build_ours,
    by_peer_precision,
    compare_all,
    embed_in_turns,
    shared_fields,
    write_resized,
)
from benchmarks.settings import PeersSettings
from benchmarks.untrained import create_untrained
from infer.engines import unavailable_reason
from isic.dataset import Dataset
from isic.preprocess import PreprocessSpec, decode, resize
from tests.support.commands import Cli, split_flags


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "peer"),
    [
        ("eager", "timm eager + DataLoader"),
        pytest.param("ray data", "Ray Data + timm", marks=pytest.mark.ray),
    ],
)
def test_the_same_images_give_the_same_features_everywhere(
    word: str, peer: str, tiny_80: Path, small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    places = ("--config", tiny_80, "--data", small_dataset, "--results", tmp_path)
    flags = split_flags("--images 75 --batch 8 --repeats 1 --num_workers 0 --device cpu")
    ended = cli("benchmarks", "peers", *places, *flags, "--peers", word)
    assert ended.code == 0, ended.err
    (row,) = pl.read_csv(tmp_path / "peers.csv").rows(named=True)
    assert row["peer"] == peer
    assert row["images"] == 75, "the dataset has 60"
    assert row["ratio"] > 0
    assert row["ours"].endswith("onnx fp32")
    assert row["peer_precision"] == "fp32"
    assert row["cosine_same_pixels"] > 0.99999
    assert row["cosine"] > 0.9999


@pytest.mark.slow
def test_an_engine_that_does_not_open_costs_its_rows_only(
    tiny_80: Path, small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    if unavailable_reason("aoti", "cuda") is None:
        pytest.skip("there is a GPU here")
    places = ("--config", tiny_80, "--data", small_dataset, "--results", tmp_path)
    flags = split_flags("--images 8 --repeats 1 --device cuda --peers eager")
    ended = cli("benchmarks", "peers", *places, *flags)
    assert ended.code == 0, ended.err
    (row,) = pl.read_csv(tmp_path / "peers.csv").to_dicts()
    # It is refused when it opens, not when it first runs.
    assert "ONNX Runtime does not run on --device cuda here" in row["reason"]


@pytest.mark.slow
def test_a_baseline_that_fails_is_left_out(
    tiny_80: Path, small_dataset: Path, tmp_path: Path
) -> None:
    settings = PeersSettings(config=str(tiny_80), data=small_dataset, batch=2, device="cpu")
    untrained = create_untrained(str(tiny_80))
    ids = Dataset(small_dataset).metadata("train")["isic_id"].to_list()[:2]
    common = shared_fields(untrained, ids, settings, tmp_path)
    ours, reasons = build_ours(
        untrained, common, settings, ["fp32"], tmp_path, ArtifactStore(tmp_path / "artifacts")
    )
    processes = {name: BaselineProcess(task) for name, task in ours.items()}
    absent = tmp_path / "absent"
    rates, features = embed_in_turns(processes, absent, absent, len(ids), repeats=1)
    (process,) = processes.values()
    assert not reasons
    assert process.reason
    assert "absent" in process.reason
    assert rates == {f"{OURS}, onnx fp32": []}
    assert features == {"cosine": {}, "cosine_same_pixels": {}}


def test_on_a_gpu_the_peers_compute_in_the_precision_of_ours() -> None:
    settings = PeersSettings(precision=("bf16", "int8", "fp16", "fp32"))
    assert by_peer_precision(settings, "cuda") == {
        "bf16": ["bf16"],
        "fp16": ["int8", "fp16"],
        "fp32": ["fp32"],
    }
    assert by_peer_precision(settings, "cpu") == {"fp32": list(settings.precision)}


def test_resized_images_have_the_pixels_of_the_network(small_dataset: Path, tmp_path: Path) -> None:
    dataset = Dataset(small_dataset)
    spec = PreprocessSpec(size=32)
    ids = [*dataset.metadata("train")["isic_id"].to_list()[:5]] * 2
    again = Dataset(write_resized(dataset, ids, spec, tmp_path))
    files = dataset.images("train").read(ids)
    resized_files = again.images("train").read(ids)
    for before, after in zip(files, resized_files, strict=True):
        pixels = decode(after)
        assert (pixels == resize(decode(before), spec)).all()
        assert (resize(pixels, spec) == pixels).all()


def test_an_unknown_peer_is_refused(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    flags = ("--config", "demo", "--data", small_dataset, "--peers", "keras")
    ended = cli("benchmarks", "peers", *flags)
    assert ended.code == 2
    assert "no peer has" in ended.err


def test_ratios_are_taken_within_each_repeat() -> None:
    rates = {"infer embed, onnx fp32": [10.0, 30.0], "peer": [5.0, 10.0]}
    features = {name: np.ones((2, 3), np.float32) for name in rates}
    (row,) = compare_all(rates, {"cosine": features}, {}, ["peer"])
    assert (row["ratio_min"], row["ratio"], row["ratio_max"]) == (2.0, 2.5, 3.0)
    assert row["cosine"] == 1.0


def test_a_peer_that_failed_has_its_reason() -> None:
    rates = {"infer embed, onnx fp32": [1.0]}
    (row,) = compare_all(rates, {"cosine": {}}, {"peer": "is not there"}, ["peer"])
    assert row["reason"] == "is not there"
    assert "ratio" not in row
