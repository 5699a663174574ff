import os
import subprocess
import sys
from pathlib import Path

import polars as pl
from conftest import Cli


def test_a_packed_folder_runs_by_itself(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "packed"
    flags = ["--data", small_dataset, "--images", 20, "--wheels", "none"]
    ended = cli("benchmarks", "pack", "--out", out, *flags)
    assert ended.code == 0, ended.err
    assert (out / "code" / "benchmarks" / "COMMIT").read_text().strip()
    command = [str(out / "run.sh"), "--parts", "ingest,train", "--images", "20", "--repeats", "1", "--minutes", "4"]
    command += ["--config", "demo", "--precision", "fp32"]
    environment = {**os.environ, "PYTHON": sys.executable}
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = pl.read_csv(out / "results" / "ingest.csv", infer_schema=False)
    trained = pl.read_csv(out / "results" / "train.csv")
    assert trained["what"].to_list() == ["demo"] and trained["images_per_second"][0] > 0
    assert len(rows) > 2 and rows["commit"][0] == (out / "code" / "benchmarks" / "COMMIT").read_text().strip()
    assert cli("benchmarks", "pack", "--out", out, *flags).code == 2, "what is there is not overwritten"


def test_a_part_that_fails_or_is_late_is_left_behind(tmp_path: Path, cli: Cli) -> None:
    late = cli("benchmarks", "gpu", "--parts", "ingest", "--minutes", 0.001, "--data", tmp_path)
    assert late.code == 1 and "stopped: no time left" in late.out
    assert cli("benchmarks", "gpu", "--parts", "ingset").code == 2
