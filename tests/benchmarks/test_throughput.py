from pathlib import Path

import polars as pl
import pytest

from tests.support.commands import Cli, split_flags


@pytest.mark.slow
def test_every_engine_is_measured_in_its_own_process(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    flags = split_flags("--formats eager,onnx --precision fp32 --batch 1,2 --device cpu")
    short = ("--repeats", 2, "--seconds", 0.01, "--results", tmp_path)
    ended = cli("benchmarks", "throughput", "--config", tiny, *flags, *short)
    assert ended.code == 0, ended.err
    rows = pl.read_csv(tmp_path / "throughput.csv")
    assert rows["what"].unique().to_list() == ["tiny"]
    assert rows["engine"].to_list() == ["eager", "eager", "onnx", "onnx"]
    assert rows["batch"].to_list() == [1, 2, 1, 2]
    assert (rows["min"] <= rows["images_per_second"]).all()
    assert (rows["images_per_second"] <= rows["max"]).all()
    assert (rows["p50_ms"] <= rows["p99_ms"]).all()
    assert (rows["cosine"] > 0.99999).all()
    eager, onnx = rows["peak_mb"].gather([0, 2])
    assert 20 < onnx < eager, "ONNX Runtime's process has no torch in it"
    assert set(rows["bound_by"]) <= {"matmul", "copy"}
    assert (rows["of_matmul"] > 0).all()


def test_an_engine_that_takes_too_long_costs_its_row_only(
    tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ["--formats", "eager", "--patience", 0.01, "--results", tmp_path, "--device", "cpu"]
    ended = cli("benchmarks", "throughput", "--config", tiny, *flags)
    assert ended.code == 0, ended.err
    assert pl.read_csv(tmp_path / "throughput.csv")["reason"].to_list() == ["took longer than 0 s"]


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ("--formats onxx", 'did you mean "onnx"?'),
        ("--engine onxx", 'did you mean "onnx"?'),
        ("--config vit_tyni", 'did you mean "vit_tiny"?'),
        ("--formats eager --precision int8", "no engine of --formats has such a --precision"),
    ],
)
def test_unknown_engines_and_configs_are_refused(
    flags: str, hint: str, tmp_path: Path, cli: Cli
) -> None:
    common = ("--device", "cpu", "--results", tmp_path)
    ended = cli("benchmarks", "throughput", *flags.split(), *common)
    assert ended.code == 2, ended.err
    assert hint in ended.err
    assert not (tmp_path / "throughput.csv").exists()
