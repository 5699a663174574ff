from pathlib import Path

import polars as pl
import pytest

from tests.support.commands import Cli


@pytest.mark.slow
def test_an_export_is_timed_and_compared(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    flags = ("--formats", "onnx,tensorrt", "--precision", "fp32", "--results", tmp_path)
    ended = cli("benchmarks", "export", "--config", tiny, *flags)
    assert ended.code == 0, ended.err
    onnx, tensorrt = pl.read_csv(tmp_path / "export.csv").rows(named=True)
    assert onnx["seconds"] > 0
    assert 0.1 < onnx["megabytes"] < 10
    assert onnx["cosine"] > 0.99999
    assert onnx["max_logit_error"] < 1e-3
    assert onnx["reason"] is None
    # A machine without TensorRT has the reason.
    assert tensorrt["reason"] or tensorrt["cosine"] > 0.99
