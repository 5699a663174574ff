"""`python -m benchmarks pack`: a folder with all that a GPU machine without network needs."""

import shutil
import stat
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import polars as pl

from benchmarks.record import COMMIT_FILE, commit
from benchmarks.settings import CHECKOUT, PackSettings
from isic import schema
from isic.dataset import Dataset
from isic.runtime.errors import UserError
from isic.runtime.files import write_text
from isic.synth.write import write_images

CODE = ("isic", "train", "export", "infer", "benchmarks", "configs")
NO_WHEELS = ("none",)
SCRIPT = Path(__file__).with_name("run.sh")


def pack(settings: PackSettings) -> None:
    """Run `benchmarks pack`, which its settings describe."""
    folder = settings.output_dir
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another --output_dir")
    copy_code(folder / "code")
    copy_sample(settings.data, folder / "data", settings.images)
    if settings.wheels != NO_WHEELS:
        fetch_wheels(settings, folder / "wheels")
    script = Path(shutil.copy(SCRIPT, folder))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)  # an installed wheel lost the bit
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(
        f"packed {size / 1e6:.0f} MB into {folder}; run {script.name} on the machine and bring "
        "back results/"
    )


def copy_code(target: Path) -> None:
    """Copy the packages, without results, and the name of their commit."""
    ignore = shutil.ignore_patterns("__pycache__", "results")
    for name in CODE:
        shutil.copytree(CHECKOUT / name, target / name, ignore=ignore)
    write_text(target / COMMIT_FILE.relative_to(CHECKOUT), commit() + "\n")


def copy_sample(data: Path, target: Path, num_images: int) -> None:
    """Write some images of a dataset, with their rows, as a dataset that can be trained on."""
    dataset = Dataset(data)
    table = dataset.metadata("train")
    store = dataset.images("train")
    table = table.filter(~table[schema.ID].is_in(store.missing(table[schema.ID].to_list())))
    # Positives are rare: take all of them, up to half of the sample.
    is_positive = table[schema.TARGET] == 1
    positives = table.filter(is_positive).head(num_images // 2)
    negatives = table.filter(~is_positive).head(num_images - len(positives))
    sample = pl.concat([positives, negatives]).sort(schema.ID)
    target.mkdir(parents=True)
    ids = sample[schema.ID].to_list()
    write_images(target / "train-image.hdf5", zip(ids, store.read(ids), strict=True))
    sample.write_csv(target / "train-metadata.csv")


def fetch_wheels(settings: PackSettings, target: Path) -> None:
    """Download wheels for the other machine, in the versions installed here."""
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--only-binary=:all:",
        "--implementation", "cp", "--python-version", settings.python,
    ]
    # fmt: on
    for tag in settings.platform:
        command += ["--platform", tag]
    command += ["--dest", str(target), *map(_pinned, settings.wheels)]
    # pip selects wheels by the tags of the other machine, so nothing is installed here.
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines()
        reason = lines[-1] if lines else "no reason given"
        raise UserError(
            f"pip cannot download the wheels ({reason}); choose other --wheels, or none"
        )


def _pinned(package: str) -> str:
    """Return a requirement for pip of the installed version, if there is one."""
    try:
        return f"{package}=={version(package)}"
    except PackageNotFoundError:
        return package
