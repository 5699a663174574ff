from pathlib import Path

import polars as pl
import pytest

from benchmarks.correctness import engine_precisions, read_result
from tests.support.commands import Cli


@pytest.mark.slow
def test_every_check_has_a_row(tiny: Path, small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    flags = ("--device", "cpu", "--data", small_dataset, "--results", tmp_path)
    ended = cli("benchmarks", "correctness", "--config", tiny, *flags, "--num_at_once", 2)
    assert ended.code == 0, ended.err
    assert "4 of 4 are correct" in ended.out
    rows = pl.read_csv(tmp_path / "correctness.csv")
    assert set(rows.select("what", "check", "precision").iter_rows()) == {
        ("tiny", "training step", "fp32"),
        ("tiny", "training step", "bf16"),
        ("tiny", "onnx", "fp32"),
        ("tiny", "aoti", "fp32"),
    }
    engines = rows.filter(pl.col("batches") == "1 2 7 16")
    assert len(engines) == 2
    assert (engines["cosine"] > 0.99999).all()
    assert (engines["max_logit_error"] < 1e-3).all()
    steps = rows.filter(check="training step")
    assert (steps["loss"] > 0).all()
    assert (steps["gradient_norm"] > 0).all()


def test_a_check_that_takes_too_long_costs_its_row_only(
    tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ("--device", "cpu", "--formats", "onnx", "--results", tmp_path, "--patience", 0.01)
    ended = cli("benchmarks", "correctness", "--config", tiny, *flags)
    assert ended.code == 1
    reasons = pl.read_csv(tmp_path / "correctness.csv")["reason"]
    assert reasons.to_list() == ["took longer than 0 s"] * 3


def test_a_crash_has_the_last_line_of_the_process(tmp_path: Path) -> None:
    output = tmp_path / "job.log"
    output.write_text("first\nSegmentation fault\n")
    reason = "its process ended with -11: Segmentation fault"
    assert read_result(output, -11, 60) == {"reason": reason}
    output.with_suffix(".result").write_text('{"cosine": 1.0}')
    assert read_result(output, 0, 60) == {"cosine": 1.0}


def test_a_format_that_lacks_the_precision_is_checked_in_its_own() -> None:
    assert engine_precisions("onnx", "cpu", ("bf16",)) == ("fp32",)
    assert engine_precisions("aoti", "cpu", ("bf16",)) == ("bf16",)
    assert engine_precisions("onnx", "cpu", ("int8", "fp32")) == ("fp32", "int8")
    assert engine_precisions("onnx", "cpu", ()) == ("fp32",)
