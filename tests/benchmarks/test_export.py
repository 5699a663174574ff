from pathlib import Path

import polars as pl

from tests.support.commands import TINY_YAML, Cli


def test_an_export_is_timed_weighed_and_compared(tmp_path: Path, cli: Cli) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY_YAML)
    flags = ["--formats", "onnx,tensorrt", "--precision", "fp32", "--results", tmp_path]
    ended = cli("benchmarks", "export", "--config", config, *flags)
    assert ended.code == 0, ended.err
    onnx, tensorrt = pl.read_csv(tmp_path / "export.csv").rows(named=True)
    assert onnx["seconds"] > 0
    assert 0.1 < onnx["megabytes"] < 10
    assert onnx["cosine"] > 0.99999
    assert onnx["max_logit_error"] < 1e-3
    assert onnx["reason"] is None
    assert tensorrt["reason"] or tensorrt["cosine"] > 0.99, "a machine without TensorRT says so"
