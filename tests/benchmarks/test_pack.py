import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import polars as pl
import pytest

from benchmarks.pack import SCRIPT
from tests.support.commands import Cli, split_flags

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SMALL_WHEELS = ("fire", "termcolor", "typing-extensions")
PARTS = "correctness,throughput,embed,train"
RESULTS = {"correctness.csv", "throughput.csv", "embed.csv", "train.csv", "run.log"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_packed_folder_runs_by_itself(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "packed"
    flags = ["--data", small_dataset, "--images", 20, "--wheels", "none"]
    ended = cli("benchmarks", "pack", "--output_dir", out, *flags)
    assert ended.code == 0, ended.err
    commit = (out / "code" / "benchmarks" / "COMMIT").read_text().strip()
    assert commit
    # Half of the sample: the dataset has 20 malignant lesions.
    assert pl.read_csv(out / "data" / "train-metadata.csv")["target"].sum() == 10
    flags = split_flags(f"--parts {PARTS} --images 40 --repeats 1 --seconds 0.01")
    flags += split_flags("--config demo --precision fp32 --batch 16")
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
    assert "4 of 4 parts succeeded" in ran.stdout
    results = out / "results"
    assert {path.name for path in results.iterdir()} == RESULTS
    assert (results / "run.log").read_text() == ran.stdout
    tables = {path.stem: pl.read_csv(path) for path in results.glob("*.csv")}
    for name, table in tables.items():
        assert set(table["commit"].cast(pl.String)) == {commit}, name
        assert "reason" not in table.columns, name
    assert set(tables["correctness"]["check"]) == {"training step", "onnx", "aoti"}
    # Built by the first part, and found by the others.
    built = [path.name for path in (out / "artifacts" / commit).iterdir()]
    assert sorted(built) == ["demo-aoti-fp32-cpu-16", "demo-onnx-fp32-cpu-16"]
    assert tables["embed"]["images"].to_list() == [40]
    assert tables["embed"]["what"].to_list() == ["demo, onnx fp32"]
    assert tables["train"]["images_per_second"][0] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("package_index")
def test_a_stopped_run_has_unpacked_the_packages_and_written_its_rows(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "packed"
    flags = ["--data", small_dataset, "--images", 20, "--python", PYTHON]
    ended = cli("benchmarks", "pack", "--out", out, *flags, "--wheels", ",".join(SMALL_WHEELS))
    assert ended.code == 0, ended.err
    site = tmp_path / "elsewhere" / "site"
    site.parent.mkdir()
    environment = {"PYTHON": sys.executable, "SITE": str(site), "OUT": "mine"}
    rows = tmp_path / "mine" / "correctness.csv"
    with subprocess.Popen(
        [str(out / "run.sh"), "--parts", "correctness", "--config", "demo", "--device", "cpu"],
        env={**os.environ, **environment},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        while not rows.is_file() and process.poll() is None:
            time.sleep(0.1)
        process.terminate()
        text, _ = process.communicate()  # returns when all processes have ended
    assert process.returncode == 128 + signal.SIGTERM
    assert pl.read_csv(rows)["check"][0] == "training step"
    assert (tmp_path / "mine" / "run.log").read_text() == text
    assert {path.name for path in site.iterdir()} >= {"fire", "termcolor", "typing_extensions.py"}
    assert {path.name for path in site.parent.iterdir()} == {"site"}


@pytest.mark.slow
@pytest.mark.usefixtures("package_index")
def test_the_folder_of_a_gpu_machine_is_under_its_limit(tmp_path: Path, cli: Cli) -> None:
    data = tmp_path / "data"
    assert cli("isic", "synth", "--out", data, "--images", 1500).code == 0
    out = tmp_path / "packed"
    ended = cli("benchmarks", "pack", "--out", out, "--data", data)
    assert ended.code == 0, ended.err
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) < 60e6
    assert len(pl.read_csv(out / "data" / "train-metadata.csv")) == 1000
    with tarfile.open(out / "site.tar.xz") as archive:
        names = archive.getnames()
    for package in ("typing_extensions.py", "polars", "pydantic_core", "albumentations", "timm"):
        assert f"./{package}" in names
    assert any("cp312" in name or "cpython-312" in name for name in names)


def test_a_folder_over_the_limit_is_refused(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    flags = ["--data", small_dataset, "--images", 20, "--wheels", "none", "--limit_mb", 0.1]
    ended = cli("benchmarks", "pack", "--out", tmp_path / "new" / "packed", *flags)
    assert ended.code == 2
    assert re.search(r"the folder has \d\.\d MB \(code \d\.\d MB, data 0\.\d MB\)", ended.err)
    assert "over --limit_mb 0.1; pack fewer --images or --wheels" in ended.err
    assert not any((tmp_path / "new").iterdir())


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
