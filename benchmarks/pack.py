"""`python -m benchmarks pack`: a folder that a GPU machine without a network needs to run the benchmarks."""

import shutil
import stat
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import polars as pl
from pydantic import Field

from benchmarks.record import COMMIT_FILE, commit
from isic import schema
from isic.dataset import Dataset
from isic.runtime.config import Settings, Several
from isic.runtime.errors import UserError
from isic.runtime.files import write_text
from isic.synth.write import write_images

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("isic", "train", "export", "infer", "benchmarks", "configs")
WHEELS = (
    "fire",
    "termcolor",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "polars",
    "polars-runtime-32",
    "albumentations",
    "albucore",
    "stringzilla",
    "simsimd",
)
"""What a machine set up for PyTorch, timm and ONNX usually lacks."""
SCRIPT = Path(__file__).with_name("run.sh")


class PackSettings(Settings):
    """What `python -m benchmarks pack` takes."""

    out: Path = Field(description="folder to write; it may not exist yet")
    data: Path = Field(
        Path("data/isic-2024"), description="dataset from which a sample of images goes along"
    )
    images: int = Field(4096, ge=1, description="images of the sample")
    wheels: Several[str] = Field(
        WHEELS, description="packages that the machine lacks, as wheels; none: none"
    )
    python: str = Field("3.12", description="the machine's Python")
    platform: Several[str] = Field(
        (
            "manylinux_2_28_x86_64",
            "manylinux_2_27_x86_64",
            "manylinux_2_17_x86_64",
            "manylinux2014_x86_64",
        ),
        description="the machine's platform tags",
    )


def pack(settings: PackSettings) -> None:
    """Writes code, wheels, a sample of images and the script `run.sh` into a folder to copy over."""
    if settings.out.exists():
        raise UserError(f"{settings.out} is there already; name a folder that is not")
    copy_code(settings.out / "code")
    copy_sample(settings.data, settings.out / "data", settings.images)
    if settings.wheels != ("none",):
        fetch_wheels(settings)
    script = Path(shutil.copy(SCRIPT, settings.out))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)  # a wheel has lost it
    size = sum(path.stat().st_size for path in settings.out.rglob("*") if path.is_file())
    print(
        f"packed {size / 1e6:.0f} MB into {settings.out}; there, run {script.name} and bring back results/"
    )


def copy_code(target: Path) -> None:
    """Copies the rooms without results, and says which commit they are."""
    for room in ROOMS:
        shutil.copytree(
            ROOT / room, target / room, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    write_text(target / COMMIT_FILE.relative_to(ROOT), commit() + "\n")


def copy_sample(data: Path, target: Path, number: int) -> None:
    """Writes some images of a dataset, and their rows, as a dataset that can be trained on.

    The first rows of the challenge's table have hardly a positive: all positives come first, up to half of the sample.
    """
    dataset = Dataset(data)
    table = dataset.metadata("train")
    store = dataset.images("train")
    table = table.filter(~table[schema.ID].is_in(store.missing(table[schema.ID].to_list())))
    is_positive = table[schema.TARGET] == 1
    positives = table.filter(is_positive).head(number // 2)
    sample = pl.concat([positives, table.filter(~is_positive).head(number - len(positives))]).sort(
        schema.ID
    )
    target.mkdir(parents=True)
    names = sample[schema.ID].to_list()
    write_images(target / "train-image.hdf5", zip(names, store.read(names), strict=True))
    sample.write_csv(target / "train-metadata.csv")


def fetch_wheels(settings: PackSettings) -> None:
    """Downloads wheels for the other machine in the versions that are installed here. Raises UserError."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += [
        "--only-binary=:all:",
        "--implementation",
        "cp",
        "--python-version",
        settings.python,
    ]
    command += [part for tag in settings.platform for part in ("--platform", tag)]
    command += ["--dest", str(settings.out / "wheels"), *map(_pinned, settings.wheels)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"pip could not download the wheels ({last}); name others with --wheels, or none"
        )


def _pinned(package: str) -> str:
    try:
        return f"{package}=={version(package)}"
    except PackageNotFoundError:
        return package
