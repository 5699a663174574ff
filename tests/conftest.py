"""Fixtures: real data if present, and one small run of every command per session."""

import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a test never waits for a hub
os.environ["ISIC_CACHE_DIR"] = tempfile.mkdtemp(prefix="isic-cache-")  # not the user's cache
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="isic-state-")  # nor the user's trust
# Small networks next to other processes: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from playwright.sync_api import Browser

import isic  # noqa: F401  switches telemetry off before a test imports a library
from isic.runtime import remote
from tests.support.browser import open_browser
from tests.support.commands import TINY, TINY_YAML, Cli, Finished, run_module
from tests.support.datasets import REAL_DATA, jpeg, small_table, write_hdf5
from tests.support.s3 import KEYS, Bucket, serve


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(f"real images and metadata are not at {REAL_DATA}")
    return REAL_DATA


@pytest.fixture(scope="session")
def package_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip the test unless pip reaches a package index."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "termcolor"]
    folder = tmp_path_factory.mktemp("index")
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if ended.returncode:
        pytest.skip(f"pip reaches no package index: {ended.stderr.splitlines()[-1]}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium for the tests of a module; see `tests.support.browser.inspect`."""
    with open_browser() as running:
        yield running


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run `python -m <module> <arguments>` in this process, without importing torch again."""

    def run(module: str, *arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        captured = capfd.readouterr()
        return Finished(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Bucket]:
    with serve() as bucket:
        yield bucket


@pytest.fixture
def bucket(s3_server: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket on an S3 server, which commands reach, and an empty cache."""
    import s3fs  # the base install has none

    for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3_server.endpoint}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ISIC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()  # those of another endpoint
    return s3_server


@pytest.fixture
def small_dataset(tmp_path: Path) -> Path:
    """60 images, dark where malignant, with ids, targets and patients only."""
    folder = tmp_path / "small"
    folder.mkdir()
    table = small_table()
    table.write_csv(folder / "train-metadata.csv")
    rows = enumerate(table.select("isic_id", "target").iter_rows())
    write_hdf5(
        folder / "train-image.hdf5",
        {name: jpeg(40 + i % 30, 90 if y else 180) for i, (name, y) in rows},
    )
    return folder


@pytest.fixture(scope="session")
def synth_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic dataset of 300 images."""
    folder = tmp_path_factory.mktemp("synth") / "data"
    run_module("isic", "synth", "--out", folder, "--images", 300, "--seed", 1)
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A config of a network that runs in a millisecond."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_YAML)
    return path


@pytest.fixture(scope="session")
def trained(synth_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three folds, one epoch each, on the synthetic dataset."""
    outputs = tmp_path_factory.mktemp("outputs")
    flags = ("--data", synth_dataset, "--output_dir", outputs, "--epochs", 1, "--num_folds", 3)
    run_module("train", *TINY, *flags)
    return outputs / "tiny"


@pytest.fixture(scope="session")
def exported(trained: Path) -> Path:
    """The same run with an ONNX file in each fold."""
    run_module("export", "--config", "tiny", "--model_dir", trained)
    return trained


@pytest.fixture(scope="session")
def exported_all(
    exported: Path, synth_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A copy of that run with fold_all, exported too."""
    run = tmp_path_factory.mktemp("all") / "tiny"
    shutil.copytree(exported, run)
    flags = ("--data", synth_dataset, "--output_dir", run.parent, "--epochs", 1, "--num_folds", 3)
    run_module("train", *TINY, *flags, "--fold", "all")
    run_module("export", "--config", "tiny", "--model_dir", run, "--fold", "all")
    return run


@pytest.fixture(scope="session")
def embedded_all(exported_all: Path, synth_dataset: Path) -> Path:
    """Embeddings of the test split by fold_all."""
    output = exported_all.parent / "embeddings"
    where = ("--model_dir", exported_all, "--data", synth_dataset, "--output_dir", output)
    run_module("infer", "embed", "--config", "tiny", *where, "--fold", "all")
    return output / "tiny_all"


@pytest.fixture(scope="session")
def embedded(exported: Path, synth_dataset: Path) -> Path:
    """Embeddings of both splits of the synthetic dataset by the exported folds."""
    output = exported.parent / "embeddings"
    run_module(
        "infer",
        "embed",
        "--config",
        "tiny",
        "--model_dir",
        exported,
        "--data",
        synth_dataset,
        "--output_dir",
        output,
    )
    return output / "tiny"
