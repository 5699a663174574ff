"""Shared fixtures: real data where it is there, and one small run of the whole road, made once a session."""

import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a test never waits for a hub
os.environ["ISIC_CACHE_DIR"] = tempfile.mkdtemp(prefix="isic-cache-")  # not the user's
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # small networks, and other processes beside them: threads would wait for each other
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # idle threads leave the cores to the other libraries

import cv2
import h5py
import numpy as np
import polars as pl
import pytest
from browser import open_browser
from playwright.sync_api import Browser

import isic  # noqa: F401  switches telemetry off before a test imports a library

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(f"real images and metadata are not at {REAL_DATA}")
    return REAL_DATA


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium for the tests of a module; see `browser.look`."""
    with open_browser() as running:
        yield running


@dataclass(frozen=True)
class Finished:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


Cli = Callable[..., Finished]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs `python -m <module> <arguments>` in this process, which spares the seconds that importing torch takes."""

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


def run_module(module: str, *arguments: object) -> None:
    """The same for fixtures that outlive a test; fails where the command does."""
    argv, sys.argv = sys.argv, [module, *map(str, arguments)]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, f"{module} {arguments} exited with {ended.code}"
    finally:
        sys.argv = argv


def jpeg(side: int = 60, value: int | None = None, seed: int = 0) -> bytes:
    """A JPEG of noise, or of one grey value."""
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    image = noise if value is None else np.full((side, side, 3), value, np.uint8)
    return bytes(cv2.imencode(".jpg", image)[1])


def write_hdf5(path: Path, files: dict[str, bytes]) -> None:
    """Writes images as the challenge does: one scalar dataset of fixed-length bytes an id."""
    with h5py.File(path, "w") as file:
        for name, data in files.items():
            file.create_dataset(name, data=np.bytes_(data))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mounts a file system of a few kilobytes; skips where this user may not."""
    folder.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not mounted or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def small_table(num_rows: int = 60, num_patients: int = 15) -> pl.DataFrame:
    """Ids, targets (every third positive) and patients."""
    return pl.DataFrame(
        {
            "isic_id": [f"ISIC_{row:07d}" for row in range(num_rows)],
            "target": [int(row % 3 == 0) for row in range(num_rows)],
            "patient_id": [f"IP_{row % num_patients:07d}" for row in range(num_rows)],
        }
    )


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


TINY = (
    "--model",
    "test_vit",
    "--pretrained",
    "false",
    "--image_size",
    32,
    "--num_workers",
    0,
    "--name",
    "tiny",
)
"""Flags of a model that trains in seconds."""


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
