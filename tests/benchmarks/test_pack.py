import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from benchmarks.pack import SCRIPT
from tests.support.commands import Cli, split_flags


@pytest.mark.slow
def test_a_packed_folder_runs_by_itself(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "packed"
    flags = ["--data", small_dataset, "--images", 20, "--wheels", "none"]
    ended = cli("benchmarks", "pack", "--output_dir", out, *flags)
    assert ended.code == 0, ended.err
    commit = (out / "code" / "benchmarks" / "COMMIT").read_text().strip()
    assert commit
    # Half of the sample: the dataset has 20 malignant lesions.
    assert pl.read_csv(out / "data" / "train-metadata.csv")["target"].sum() == 10
    flags = split_flags("--parts ingest,train --images 20 --repeats 1 --minutes 4")
    flags += split_flags("--config demo --precision fp32")
    ran = subprocess.run(
        [str(out / "run.sh"), *flags],
        env={**os.environ, "PYTHON": sys.executable},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "torch 2." in ran.stdout
    assert re.search("AOTInductor, CPU +yes", ran.stdout)
    rows = pl.read_csv(out / "results" / "ingest.csv", infer_schema=False)
    trained = pl.read_csv(out / "results" / "train.csv")
    assert trained["what"].to_list() == ["demo"]
    assert trained["images_per_second"][0] > 0
    assert len(rows) > 2
    assert rows["commit"][0] == commit


def test_an_existing_folder_is_not_overwritten(tmp_path: Path, cli: Cli) -> None:
    ended = cli("benchmarks", "pack", "--out", tmp_path)
    assert ended.code == 2
    assert "exists already" in ended.err


LIBRARIES = """#!/bin/sh
echo "	libcudart.so.13 (libc6,x86-64) => /usr/lib/libcudart.so.13"
echo "	libcuda.so.1 (libc6) => /usr/lib32/libcuda.so.1"
echo "	libcuda.so.1 (libc6,x86-64) => {driver}"
"""


def test_the_linker_finds_the_driver_and_python_the_wheels(tmp_path: Path) -> None:
    """Scripts replace ldconfig and Python, because this machine has no driver."""
    driver = tmp_path / "libcuda.so.1"
    driver.touch()
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {"ldconfig": LIBRARIES.format(driver=driver), "python": "#!/bin/sh\nenv"}
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": str(programs / "python"),
        "SITE": "/elsewhere/site",
        "LIBRARY_PATH": "/opt/lib",
    }
    command = ["sh", shutil.copy(SCRIPT, tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    variables = ran.stdout.splitlines()
    assert (tmp_path / "link" / "libcuda.so").resolve() == driver
    assert f"LIBRARY_PATH={tmp_path / 'link'}:/opt/lib" in variables
    assert f"PYTHONPATH={tmp_path / 'code'}:/elsewhere/site" in variables
