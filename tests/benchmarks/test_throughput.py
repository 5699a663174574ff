from pathlib import Path

import polars as pl
import pytest

from tests.support.commands import TINY_YAML, Cli


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A config of a network that runs in a millisecond."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_YAML)
    return path


def test_every_engine_is_measured_in_its_own_process(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    flags = [
        "--precision",
        "fp32",
        "--batch",
        "1,2",
        "--repeats",
        2,
        "--seconds",
        0.01,
        "--device",
        "cpu",
    ]
    ended = cli(
        "benchmarks",
        "throughput",
        "--config",
        tiny,
        "--formats",
        "eager,onnx",
        *flags,
        "--results",
        tmp_path,
    )
    assert ended.code == 0, ended.err
    rows = pl.read_csv(tmp_path / "throughput.csv")
    assert rows.select("what", "engine", "batch").rows() == [
        ("tiny", e, b) for e in ("eager", "onnx") for b in (1, 2)
    ]
    assert (rows["min"] <= rows["images_per_second"]).all()
    assert (rows["images_per_second"] <= rows["max"]).all()
    assert (rows["p50_ms"] <= rows["p99_ms"]).all()
    assert (rows["cosine"] > 0.99999).all()
    eager, onnx = rows["peak_mb"].gather([0, 2])
    assert 20 < onnx < eager, "ONNX Runtime's process has no torch in it"
    assert set(rows["bound_by"]) <= {"matmul", "copy"}
    assert (rows["of_matmul"] > 0).all()


def test_an_engine_that_is_given_up_costs_its_row_only(
    tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ["--formats", "eager", "--patience", 0.01, "--results", tmp_path, "--device", "cpu"]
    ended = cli("benchmarks", "throughput", "--config", tiny, *flags)
    assert ended.code == 0, ended.err
    assert pl.read_csv(tmp_path / "throughput.csv")["reason"].to_list() == ["took longer than 0 s"]


def test_unknown_engines_and_configs_are_sentences(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    for flags, hint in (
        (["--config", tiny, "--formats", "onxx"], 'did you mean "onnx"?'),
        (["--config", "vit_tyni"], 'did you mean "vit_tiny"?'),
        (
            ["--config", tiny, "--formats", "eager", "--precision", "int8", "--device", "cpu"],
            "--precision",
        ),
    ):
        ended = cli("benchmarks", "throughput", *flags, "--results", tmp_path)
        assert ended.code == 2, ended.err
        assert hint in ended.err, ended.err
    assert not (tmp_path / "throughput.csv").exists()
