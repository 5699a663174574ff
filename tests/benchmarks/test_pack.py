import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl

from benchmarks.pack import SCRIPT
from tests.support.commands import Cli


def test_a_packed_folder_runs_by_itself(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "packed"
    flags = ["--data", small_dataset, "--images", 20, "--wheels", "none"]
    ended = cli("benchmarks", "pack", "--output_dir", out, *flags)
    assert ended.code == 0, ended.err
    assert (out / "code" / "benchmarks" / "COMMIT").read_text().strip()
    assert pl.read_csv(out / "data" / "train-metadata.csv")["target"].sum() == 10, (
        "half of the sample, of 20 positives"
    )
    command = [
        str(out / "run.sh"),
        "--parts",
        "ingest,train",
        "--images",
        "20",
        "--repeats",
        "1",
        "--minutes",
        "4",
    ]
    command += ["--config", "demo", "--precision", "fp32"]
    environment = {**os.environ, "PYTHON": sys.executable}
    ran = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "torch 2." in ran.stdout, "a log explains itself"
    assert "AOTInductor, CPU         works" in ran.stdout, "a log explains itself"
    rows = pl.read_csv(out / "results" / "ingest.csv", infer_schema=False)
    trained = pl.read_csv(out / "results" / "train.csv")
    assert trained["what"].to_list() == ["demo"]
    assert trained["images_per_second"][0] > 0
    assert len(rows) > 2
    assert rows["commit"][0] == (out / "code" / "benchmarks" / "COMMIT").read_text().strip()
    assert cli("benchmarks", "pack", "--output_dir", out, *flags).code == 2, (
        "what is there is not overwritten"
    )


LIBRARIES = """#!/bin/sh
echo "	libcudart.so.13 (libc6,x86-64) => /usr/lib/libcudart.so.13"
echo "	libcuda.so.1 (libc6) => /usr/lib32/libcuda.so.1"
echo "	libcuda.so.1 (libc6,x86-64) => {driver}"
"""


def test_the_linker_finds_the_driver_and_python_the_wheels(tmp_path: Path) -> None:
    """What the linker's list and Python are, is scripts here, because this machine has no driver."""
    driver, script = tmp_path / "libcuda.so.1", Path(shutil.copy(SCRIPT, tmp_path))
    driver.touch()
    for name, text in (("ldconfig", LIBRARIES.format(driver=driver)), ("python", "#!/bin/sh\nenv")):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "bin" / "python"),
    }
    environment |= {"SITE": "/elsewhere/site", "LIBRARY_PATH": "/opt/lib"}
    ran = subprocess.run(
        ["sh", script], env=environment, capture_output=True, text=True, check=True
    )
    said = ran.stdout.splitlines()
    assert (tmp_path / "link" / "libcuda.so").resolve() == driver
    assert f"LIBRARY_PATH={tmp_path / 'link'}:/opt/lib" in said
    assert f"PYTHONPATH={tmp_path / 'code'}:/elsewhere/site" in said
